"""What a training minimises: how a micro-batch goes through the model, and the loss of its outputs.

The train step knows only the interface `Objective`. Pretraining and finetuning have the same one,
`NextTokenLoss`, and differ in their loss masks; another method of training is another class here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from glm3cli.config.training import TrainConfig
from glm3cli.data.samples.loader import Batch, Loader
from glm3cli.train.progress.totals import Totals

# What the train step needs for a micro-batch on the last stage: the value to differentiate, the
# weight by whose sum over the global batch the gradients are divided, and a report. For `loss` and
# for each of the objective's `metrics` it has a sum and a weight, which the train step adds up;
# `tokens` may have the number of trained tokens in both places, where it isn't the weight.
Losses = tuple[Tensor, Tensor, dict[str, Tensor]]
LossFunction = Callable[[Tensor], Losses]
Forward = Callable[[Iterator[Batch], torch.nn.Module], tuple[Tensor, LossFunction]]
# Runs a global batch of a loader, whose position is given, through the model without training on
# it; the losses of the function `Forward` report the named metrics, whose totals are returned.
Score = Callable[[Forward, tuple[str, ...], Loader, int], Totals]


class Objective(Protocol):
    """The forward pass and the loss of a micro-batch, as the train step uses them."""

    @property
    def loss_divisor(self) -> float:
        """The divisor of the losses while gradients are computed; the train step undoes it."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the means that are reported beside the loss, the same on every rank.

        A name is GROUP/NAME, such as `rewards/chosen`. report.html has one chart for each group.
        """

    def begin(self, loader: Loader, consumed: int, score: Score) -> None:
        """Finds out what the losses of a global batch need to know of all of it, before it is run.

        Every rank calls it.

        Args:
            loader: Cuts the samples into this rank's micro-batches.
            consumed: The position in the samples at which the global batch begins.
            score: Runs samples through the model without training on them.
        """

    def forward(
        self, batches: Iterator[Batch], chunk: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Runs the next micro-batch through a model chunk.

        Args:
            batches: The micro-batches of the global batch that are left for this chunk.
            chunk: One of this rank's model chunks.

        Returns:
            The chunk's output, and the function that makes the losses of it on the last stage.
        """


@dataclass(frozen=True)
class NextTokenLoss:
    """The cross-entropy of the next token, weighted by the loss mask.

    Attributes:
        loss_divisor: The divisor of the losses while gradients are computed. The loss of a
            micro-batch is a sum; the divisor brings it near the mean, so that fp16 gradients don't
            overflow. It is a power of two, so that nothing is rounded differently.
        metrics: The names of the losses of the data sets, where there are several.
    """

    loss_divisor: float
    metrics: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: TrainConfig, sources: Sequence[str] = ()) -> "NextTokenLoss":
        """Returns the objective of a run.

        Args:
            config: The settings of the run.
            sources: The names of its data sets, as the batches have them.
        """
        weight = config.micro_batch_size
        if config.loss_average == "token":
            weight *= config.seq_length
        metrics = tuple(_metric(name) for name in dict.fromkeys(sources))
        return cls(2.0 ** math.ceil(math.log2(weight)), metrics if len(metrics) > 1 else ())

    def begin(self, loader: Loader, consumed: int, score: Score) -> None:
        """Does nothing: the loss of a token needs to know no other."""

    def forward(
        self, batches: Iterator[Batch], chunk: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Runs the next micro-batch, with tokens [b, s], through a model chunk.

        Args:
            batches: The micro-batches of the global batch that are left for this chunk.
            chunk: One of this rank's model chunks.

        Returns:
            The chunk's output, losses [b, s] on the last stage and hidden states before it; and the
            function that sums the losses.
        """
        batch = next(batches)
        output = chunk(batch.tokens, None, batch.segment_ids, labels=batch.labels)
        return output, partial(self._losses, batch.loss_mask, batch.sources)

    def _losses(self, mask: Tensor, sources: tuple[str, ...], losses: Tensor) -> Losses:
        """Sums the losses by the weights of the tokens.

        Megatron-core divides the gradient by the sum of the weights of the whole global batch
        (calculate_per_token_loss), so that a token weighs the same at all parallel sizes.

        Args:
            mask: The weight of each token, 0 for those that aren't trained; [b, s].
            sources: The name of the data set of each sample; empty where there is one.
            losses: The loss of each token, [b, s].

        Returns:
            The sum, divided by `loss_divisor`; the sum of the weights; and a report of the
            undivided sum, also by data set.
        """
        rows, weights = (losses.float() * mask).sum(dim=1), mask.sum(dim=1)
        pairs = torch.stack([rows.detach(), weights], dim=1)  # [b, 2]
        num_tokens = mask.count_nonzero().to(pairs.dtype)
        report = {"loss": pairs.sum(dim=0), "tokens": num_tokens.expand(2)}
        if self.metrics:
            for name in dict.fromkeys(sources):
                chosen = [row for row, source in enumerate(sources) if source == name]
                report[_metric(name)] = pairs[chosen].sum(dim=0)
        return rows.sum() / self.loss_divisor, weights.sum(), report


def _metric(source: str) -> str:
    """Returns the name by which the loss of a data set is reported."""
    return f"loss by data/{source}"
