"""The losses of pairs of answers, from their log-probabilities; each is of one pair, [n].

TRL's code has the same formulas: DPOTrainer, and in trl.experimental ORPOTrainer and CPOTrainer,
which also is SimPO's.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from glm3cli.config.options.preference import PreferenceOptions
from glm3cli.train.preferences.answers import Answers


def dpo(options: PreferenceOptions, chosen: Answers, rejected: Answers) -> Tensor:
    """Returns the losses of DPO (Rafailov et al. 2023, equation 7) and its other forms.

    They are hinge (SLiC-HF, Zhao et al. 2023), IPO (Azar et al. 2024, equation 17, with means over
    tokens as its authors use it), cDPO (sigmoid with label smoothing, Mitchell 2023) and Robust DPO
    (Chowdhury et al. 2024, equation 12).
    """
    beta, epsilon = options.beta, options.label_smoothing
    if options.preference_loss == "ipo":
        margins = chosen.logratios / chosen.counts - rejected.logratios / rejected.counts
        return (margins - 1 / (2 * beta)) ** 2
    margins = beta * (chosen.logratios - rejected.logratios)
    if options.preference_loss == "hinge":
        return torch.relu(1 - margins)
    if options.preference_loss == "robust":
        right, swapped = -logsigmoid(margins), -logsigmoid(-margins)
        return ((1 - epsilon) * right - epsilon * swapped) / (1 - 2 * epsilon)
    return _smoothed(margins, epsilon)


def simpo(options: PreferenceOptions, chosen: Answers, rejected: Answers) -> Tensor:
    """Returns the losses of SimPO (Meng et al. 2024, equation 6)."""
    margins = options.beta * (chosen.averages - rejected.averages) - options.simpo_gamma
    return _smoothed(margins, options.label_smoothing)


def log_odds(chosen: Answers, rejected: Answers) -> Tensor:
    """Returns the logarithm of ORPO's odds ratio (Hong et al. 2024, equations 4 and 7)."""
    # Below 0 by more than a rounding: the odds of a certain answer are infinite.
    one, other = (answers.averages.clamp(max=-1e-7) for answers in (chosen, rejected))
    return (one - other) - (_log1mexp(one) - _log1mexp(other))


def _smoothed(margins: Tensor, epsilon: float) -> Tensor:
    """Returns -log sigmoid of the margins, where a pair is swapped with probability `epsilon`."""
    return -logsigmoid(margins) * (1 - epsilon) - logsigmoid(-margins) * epsilon


def _log1mexp(values: Tensor) -> Tensor:
    """Returns log(1 - exp(x)) of negative numbers, without loss of precision (Maechler 2012)."""
    near = values > -0.693147
    # The branch that isn't taken gets a number at which its gradient is finite.
    small = torch.where(near, values, -1.0)
    large = torch.where(near, -1.0, values)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
