"""`PairLoss`: the objective of pairs of a chosen and a rejected answer (DPO, ORPO, SimPO)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from glm3cli.config.training import TrainConfig
from glm3cli.data.samples.loader import Batch, Loader
from glm3cli.errors import DataError
from glm3cli.parallel.groups import Grid
from glm3cli.train.objective import Losses, Score
from glm3cli.train.preferences.answers import (
    Answers,
    losses_of,
    own_part,
    sum_answers,
    sum_over_ranks,
    whole_segment_ids,
)
from glm3cli.train.preferences.losses import dpo, log_odds, simpo

_NLL = "loss_terms/nll"
_OF_PAIRS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


@dataclass
class PairLoss:
    """The mean loss of the pairs of a global batch.

    A term of the next-token loss of the chosen answers may be added, over the answers' tokens
    (--sft-weight) or, with ORPO, over their prompts' as well, as TRL does it. Such a term is a mean
    over all of these tokens of the global batch.

    Attributes:
        config: The settings of the run.
        grid: This rank's place among the parallel groups.
        loss_divisor: The divisor of the losses while gradients are computed; a power of two near
            the number of pairs of a micro-batch.
        metrics: The names of the further means, which are TRL's.
        nll_scale: The factor of the sum of next-token losses that turns it into its part of a sum
            over pairs; `begin` finds it for each global batch.
    """

    config: TrainConfig
    grid: Grid
    loss_divisor: float
    metrics: tuple[str, ...]
    nll_scale: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig, grid: Grid) -> "PairLoss":
        """Returns the objective of a run with these settings."""
        names: tuple[str, ...] = _OF_PAIRS
        if config.method == "orpo" or config.sft_weight:
            names += (_NLL,)
        if config.method == "orpo":
            names += ("odds/log_odds_ratio", "odds/log_odds_chosen")
        divisor = 2.0 ** math.ceil(math.log2(config.micro_batch_size))
        return cls(config, grid, divisor, names)

    @property
    def nll_weight(self) -> float:
        """The factor of the mean next-token loss of the chosen answers; 0 for none."""
        return 1.0 if self.config.method == "orpo" else self.config.sft_weight

    def begin(self, loader: Loader, consumed: int, score: Score) -> None:
        """Counts the pairs of a global batch and the tokens of its next-token loss, if it has one.

        Args:
            loader: Cuts the samples into this rank's micro-batches.
            consumed: The position in the samples at which the global batch begins.
            score: Isn't needed.
        """
        if not self.nll_weight:
            return
        pairs, tokens = 0, 0
        for batch in loader.microbatches(consumed):
            tokens += int(self._nll_mask(batch).sum())
            if self.grid.cp_rank == 0:
                pairs += _count_pairs(whole_segment_ids(batch, self.grid))
        pairs, tokens = sum_over_ranks([pairs, tokens], loader.device)
        self.nll_scale = self.nll_weight * pairs / max(tokens, 1)

    def losses(self, batch: Batch, of_tokens: Tensor) -> Losses:
        """Makes the losses of the pairs of a micro-batch.

        Args:
            batch: The micro-batch.
            of_tokens: The loss of each token, [b, s].

        Raises:
            DataError: An answer lacks its other one.
        """
        nll_mask = self._nll_mask(batch) if self.nll_weight else None
        sums = sum_answers(batch, of_tokens, self.grid, nll_mask)
        chosen, rejected = sums.good, sums.bad
        count = len(chosen.logps)
        if count != len(rejected.logps):
            raise DataError(
                f"a batch has {count} chosen and {len(rejected.logps)} rejected answers",
                "preprocess the data with --handler preference",
            )
        of_pairs, means = self._compare(chosen, rejected)
        total = of_pairs.sum()
        if self.nll_weight:
            total = total + self.nll_scale * sums.nll
            means[_NLL] = self.nll_scale / self.nll_weight * sums.nll
        parts = {name: (value.sum(), count) for name, value in means.items()}
        return losses_of(total, sums, parts, count, self.loss_divisor, self.grid)

    def _compare(self, chosen: Answers, rejected: Answers) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of each pair without next-token losses, and its metrics by name."""
        means: dict[str, Tensor] = {}
        if self.config.method == "dpo":
            losses = dpo(self.config, chosen, rejected)
            ours, theirs, logps = (
                chosen.logratios,
                rejected.logratios,
                (chosen.logps, rejected.logps),
            )
        else:
            ours, theirs, logps = (
                chosen.averages,
                rejected.averages,
                (chosen.averages, rejected.averages),
            )
            if self.config.method == "simpo":
                losses = simpo(self.config, chosen, rejected)
            else:
                odds = log_odds(chosen, rejected)
                ratio = logsigmoid(odds)
                losses = -self.config.beta * ratio
                means |= {"odds/log_odds_ratio": ratio, "odds/log_odds_chosen": odds}
        good, bad = self.config.beta * ours.detach(), self.config.beta * theirs.detach()
        values = (good, bad, good - bad, (good > bad).float(), *logps)
        return losses, means | dict(zip(_OF_PAIRS, values, strict=True))

    def _nll_mask(self, batch: Batch) -> Tensor:
        """Returns 1 for the tokens of the next-token loss, else 0, [b, s]."""
        whole = whole_segment_ids(batch, self.grid)
        is_chosen = whole % 2 == 1
        if self.config.method != "orpo":
            return own_part(is_chosen, self.grid) * batch.loss_mask
        # ORPO's are those that are followed by another token of the same answer or its prompt.
        follows = torch.zeros_like(is_chosen)
        follows[:, :-1] = whole[:, 1:] == whole[:, :-1]
        return own_part(is_chosen & follows, self.grid).float()


def _count_pairs(segment_ids: Tensor) -> int:
    """Returns the number of pairs of segment ids [b, S]: the highest of each row is its last."""
    return int(((segment_ids.max(dim=1).values + 1) // 2).sum())
