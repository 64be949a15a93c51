"""`FeedbackLoss`: the objective of answers that were liked or not (KTO)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from glm3cli.config.training import TrainConfig
from glm3cli.data.samples.loader import Batch, Loader
from glm3cli.parallel.groups import Grid
from glm3cli.train.objective import Losses, Score
from glm3cli.train.preferences.answers import (
    losses_of,
    sum_answers,
    sum_over_ranks,
    whole_segment_ids,
)

_KL = "kl/estimate"
_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    _KL,
)


@dataclass
class FeedbackLoss:
    """The mean loss of KTO over the answers of a global batch (Ethayarajh et al. 2024, equation 8).

    Its reference point is an estimate of the divergence of the model from the reference: the mean
    log-ratio of mismatched answers, each of which belongs to another prompt, but at least 0. As in
    TRL's KTOTrainer it has no gradient; it is the mean over the mismatched answers of the whole
    global batch, so that it is the same at all parallel sizes.

    Attributes:
        config: The settings of the run.
        grid: This rank's place among the parallel groups.
        loss_divisor: The divisor of the losses while gradients are computed; a power of two near
            the number of samples of a micro-batch.
        metrics: The names of the further means, which are TRL's.
        kl: The estimate of the divergence; `begin` finds it for each global batch.
        counts: The numbers of liked and of disliked answers of the global batch; `begin` counts.
    """

    config: TrainConfig
    grid: Grid
    loss_divisor: float
    metrics: tuple[str, ...] = _METRICS
    kl: float = 0.0
    counts: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, config: TrainConfig, grid: Grid) -> "FeedbackLoss":
        """Returns the objective of a run with these settings."""
        return cls(config, grid, 2.0 ** math.ceil(math.log2(config.micro_batch_size)))

    def begin(self, loader: Loader, consumed: int, score: Score) -> None:
        """Estimates the divergence from the reference, and counts the answers of a global batch.

        Args:
            loader: Cuts the samples into this rank's micro-batches.
            consumed: The position in the samples at which the global batch begins.
            score: Runs the mismatched answers through the model.
        """
        found = score(self._sum_of_logratios, (_KL,), loader.mismatched(), consumed)
        total, count = found.by_name[_KL]
        self.kl = max(0.0, total / max(count, 1))
        liked, disliked = 0, 0
        if self.grid.cp_rank == 0:
            for batch in loader.microbatches(consumed):
                good, bad = _count_answers(whole_segment_ids(batch, self.grid))
                liked, disliked = liked + good, disliked + bad
        liked, disliked = sum_over_ranks([liked, disliked], loader.device)
        self.counts = liked, disliked

    def losses(self, batch: Batch, of_tokens: Tensor) -> Losses:
        """Makes the losses of the answers of a micro-batch.

        Args:
            batch: The micro-batch.
            of_tokens: The loss of each token, [b, s].
        """
        sums = sum_answers(batch, of_tokens, self.grid, None)
        liked, disliked, beta = sums.good, sums.bad, self.config.beta
        of_liked = 1 - torch.sigmoid(beta * (liked.logratios - self.kl))
        of_disliked = 1 - torch.sigmoid(beta * (self.kl - disliked.logratios))
        total = (
            self.config.desirable_weight * of_liked.sum()
            + self.config.undesirable_weight * of_disliked.sum()
        )
        good, bad = beta * liked.logratios.sum(), beta * disliked.logratios.sum()
        num_good, num_bad = len(liked.logps), len(disliked.logps)
        parts: dict[str, tuple[Tensor, float]] = {
            "rewards/chosen": (good, num_good),
            "rewards/rejected": (bad, num_bad),
            "logps/chosen": (liked.logps.sum(), num_good),
            "logps/rejected": (disliked.logps.sum(), num_bad),
            _KL: (total.new_tensor(self.kl * (num_good + num_bad)), num_good + num_bad),
        }
        if all(self.counts):
            # The difference of two means over the global batch, in which this part has its share.
            margin = good / self.counts[0] - bad / self.counts[1]
            parts["rewards/margins"] = margin, (num_good + num_bad) / sum(self.counts)
        return losses_of(total, sums, parts, num_good + num_bad, self.loss_divisor, self.grid)

    def _sum_of_logratios(self, batch: Batch, of_tokens: Tensor) -> Losses:
        """Sums the log-ratios of the mismatched answers of a micro-batch."""
        sums = sum_answers(batch, of_tokens, self.grid, None)
        total = sums.good.logratios.sum() + sums.bad.logratios.sum()
        count = len(sums.good.logps) + len(sums.bad.logps)
        return losses_of(total, sums, {_KL: (total, count)}, count, 1.0, self.grid)


def _count_answers(segment_ids: Tensor) -> tuple[int, int]:
    """Returns the numbers of odd and of even segments of segment ids [b, S]."""
    numbers = torch.arange(1, int(segment_ids.max()) + 1, device=segment_ids.device)
    there = (segment_ids.unsqueeze(1) == numbers.view(1, -1, 1)).any(dim=2)  # [b, ids]
    return int(there[:, 0::2].sum()), int(there[:, 1::2].sum())
