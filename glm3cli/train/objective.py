"""What a training minimises: the losses of a micro-batch, made of those of its tokens.

The train step knows only the interface `Objective`. Pretraining and finetuning have the same one,
`NextTokenLoss`, and differ in their loss masks; another method of training is another class here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
# Makes them for a micro-batch from the loss of each of its tokens, [b, s].
LossFunction = Callable[[Batch, Tensor], Losses]
# Runs a global batch of a loader, whose position is given, through the model without training on
# it; what the function makes of it reports the named metrics, whose totals are returned.
Score = Callable[[LossFunction, tuple[str, ...], Loader, int], Totals]


def run_batch(chunk: torch.nn.Module, batch: Batch) -> Tensor:
    """Runs a micro-batch through a model chunk.

    Returns:
        The loss of each token on the last stage, [b, s], 0 where it isn't needed; hidden states
        before it.
    """
    output: Tensor = chunk(
        batch.tokens, None, batch.segment_ids, labels=batch.labels, loss_mask=batch.needed
    )
    return output


class Objective(Protocol):
    """The losses of a micro-batch, as the train step uses them."""

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

    def losses(self, batch: Batch, of_tokens: Tensor) -> Losses:
        """Makes the losses of a micro-batch on the last stage.

        Args:
            batch: The micro-batch.
            of_tokens: The loss of each of its tokens, [b, s].
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

    def losses(self, batch: Batch, of_tokens: Tensor) -> Losses:
        """Sums the losses by the weights of the tokens.

        Megatron-core divides the gradient by the sum of the weights of the whole global batch
        (calculate_per_token_loss), so that a token weighs the same at all parallel sizes.

        Args:
            batch: The micro-batch, whose loss mask has the weight of each token.
            of_tokens: The loss of each token, [b, s].

        Returns:
            The sum, divided by `loss_divisor`; the sum of the weights; and a report of the
            undivided sum, also by data set.
        """
        mask = batch.loss_mask
        rows, weights = (of_tokens.float() * mask).sum(dim=1), mask.sum(dim=1)
        pairs = torch.stack([rows.detach(), weights], dim=1)  # [b, 2]
        num_tokens = mask.count_nonzero().to(pairs.dtype)
        report = {"loss": pairs.sum(dim=0), "tokens": num_tokens.expand(2)}
        if self.metrics:
            for name in dict.fromkeys(batch.sources):
                chosen = [row for row, source in enumerate(batch.sources) if source == name]
                report[_metric(name)] = pairs[chosen].sum(dim=0)
        return rows.sum() / self.loss_divisor, weights.sum(), report


def _metric(source: str) -> str:
    """Returns the name by which the loss of a data set is reported."""
    return f"loss by data/{source}"
