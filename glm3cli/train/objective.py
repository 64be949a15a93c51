"""What a training minimises: how a micro-batch goes through the model, and the loss of its outputs.

The train step knows nothing of it but this interface. Text and answers have one objective, the loss
of the next token, and differ in their masks; another method of training is another class here.
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

# What megatron-core's schedule wants of the last stage's output: the value to differentiate, the
# number of trained tokens, and sums to report.
Losses = tuple[Tensor, Tensor, dict[str, Tensor]]
LossFunction = Callable[[Tensor], Losses]


class Objective(Protocol):
    """The forward pass and the loss of a micro-batch."""

    @property
    def loss_divisor(self) -> float:
        """What the losses are divided by while gradients are computed; the train step undoes it."""

    def forward(
        self, batches: Iterator[Batch], chunk: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Runs the next micro-batch through a model chunk.

        Returns:
            The chunk's output, and what makes the losses of the last stage's output.
        """


@dataclass(frozen=True)
class NextTokenLoss:
    """The cross-entropy of the next token, summed over the tokens that the loss mask trains.

    Attributes:
        loss_divisor: Keeps the loss of a micro-batch, a sum, near a mean, so that fp16 gradients
            don't overflow. It is a power of two and changes no other bit.
    """

    loss_divisor: float

    @classmethod
    def of(cls, config: TrainConfig) -> "NextTokenLoss":
        """The objective of a run with these settings."""
        return cls(2.0 ** math.ceil(math.log2(config.micro_batch_size * config.seq_length)))

    def forward(
        self, batches: Iterator[Batch], chunk: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Runs the next micro-batch, tokens [b, s], through a model chunk."""
        batch = next(batches)
        output = chunk(batch.tokens, None, batch.segment_ids, labels=batch.labels)
        return output, partial(self._losses, batch.loss_mask)

    def _losses(self, mask: Tensor, losses: Tensor) -> Losses:
        """Sums the losses where `mask` is 1, and counts them; [b, s] each.

        Megatron-core divides the gradient by the number of tokens of the whole global batch
        (calculate_per_token_loss), so that a token weighs the same at all parallel sizes.
        """
        total = (losses.float() * mask).sum()
        num_tokens = mask.sum().to(torch.int)
        sums = torch.stack([total.detach(), num_tokens.to(total.dtype)])
        return total / self.loss_divisor, num_tokens, {"sums": sums}
