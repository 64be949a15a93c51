"""What a training minimises: how a micro-batch goes through the model, and the loss of its outputs.

The train step knows only the interface `Objective`. Pretraining and finetuning have the same one,
`NextTokenLoss`, and differ in their loss masks; another method of training is another class here.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from glm3cli.config.training import TrainConfig
from glm3cli.data.samples.loader import Batch

# What megatron-core's schedule needs for a micro-batch on the last stage: the value to
# differentiate, the number by whose sum the gradients are divided, and a report. For `loss` and for
# each of the objective's `metrics` it has a sum and a count, which the train step adds up.
Losses = tuple[Tensor, Tensor, dict[str, Tensor]]
LossFunction = Callable[[Tensor], Losses]


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
    """The cross-entropy of the next token, summed over the tokens that the loss mask trains.

    Attributes:
        loss_divisor: The divisor of the losses while gradients are computed. The loss of a
            micro-batch is a sum; the divisor brings it near the mean, so that fp16 gradients don't
            overflow. It is a power of two, so that nothing is rounded differently.
        metrics: No further means.
    """

    loss_divisor: float
    metrics: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: TrainConfig) -> "NextTokenLoss":
        """Returns the objective of a run with these settings."""
        return cls(2.0 ** math.ceil(math.log2(config.micro_batch_size * config.seq_length)))

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
        return output, partial(self._losses, batch.loss_mask)

    def _losses(self, mask: Tensor, losses: Tensor) -> Losses:
        """Sums the losses where the mask is 1.

        Megatron-core divides the gradient by the number of tokens of the whole global batch
        (calculate_per_token_loss), so that a token weighs the same at all parallel sizes.

        Args:
            mask: 1 for tokens that are trained, else 0; [b, s].
            losses: The loss of each token, [b, s].

        Returns:
            The sum, divided by `loss_divisor`; the number of trained tokens; and a report of the
            undivided sum and that number.
        """
        total = (losses.float() * mask).sum()
        num_tokens = mask.sum().to(torch.int)
        report = torch.stack([total.detach(), num_tokens.to(total.dtype)])
        return total / self.loss_divisor, num_tokens, {"loss": report}
