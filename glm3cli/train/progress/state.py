"""`StepOutcome`, what one step did, and `State`, how far a run has come.

Checkpoints hold the state, so that a run goes on where it was saved.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did; the same on every rank.

    Attributes:
        loss: The mean loss of the global batch, over its trained tokens or what else the objective
            trains; NaN if there is none.
        num_tokens: The number of these tokens.
        grad_norm: The L2 norm of the whole gradient before clipping. It is NaN where a loss or
            gradient that is not finite kept the optimizer from running, and 0 where nothing was
            there to train, or fp16's loss scaler found the gradient to overflow.
        loss_scale: The factor by which the losses were multiplied before the backward pass; 1
            unless training in fp16.
        lr: The learning rate of this step.
        skipped: Whether the weights stayed as they were.
        is_overflow: Whether the step was skipped because the gradient overflowed under fp16's loss
            scale; the next step tries a smaller scale.
        means: The further means of the global batch that the objective reports, by name.
    """

    loss: float
    num_tokens: int
    grad_norm: float
    loss_scale: float
    lr: float
    skipped: bool
    is_overflow: bool = False
    means: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_nan(self) -> bool:
        """Whether the loss or the gradient of what was trained is not finite.

        Gradients that overflow because of the loss scale don't count.
        """
        is_norm_finite = self.is_overflow or math.isfinite(self.grad_norm)
        return self.num_tokens != 0 and not (math.isfinite(self.loss) and is_norm_finite)

    @property
    def reason(self) -> str:
        """The reason why a step was skipped, in words that can follow "its"."""
        if not self.num_tokens:
            return "samples have no token to train"
        if not math.isfinite(self.loss):
            return "loss is not a number"
        return "gradient overflows" if self.is_overflow else "gradient is not a number"


@dataclass
class State:
    """The progress of a run.

    Attributes:
        iteration: The number of steps done, skipped ones among them.
        consumed_samples: The position in the stream of samples, where the next step begins.
        consumed_tokens: The number of tokens in these samples, padding among them.
        skipped: The number of steps that left the weights as they were.
        nan: The number of steps whose loss or gradient was not finite, without the overflows of
            fp16's loss scale.
        stepped_over: The samples that are left out: the first, and the one behind the last, of each
            batch, by their positions in the stream.
        validated: The iteration of the last validation; 0 if there was none.
        best_loss: The lowest validation loss; None before the first one.
        best_iteration: The iteration of that validation.
        without_better: The number of validations since then.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped: int = 0
    nan: int = 0
    stepped_over: list[tuple[int, int]] = field(default_factory=list)
    validated: int = 0
    best_loss: float | None = None
    best_iteration: int = 0
    without_better: int = 0

    def advance(self, outcome: StepOutcome, num_samples: int, num_tokens: int) -> None:
        """Counts a step that was done.

        Args:
            outcome: What the step did.
            num_samples: The number of samples of its global batch.
            num_tokens: The number of their tokens, padding among them.
        """
        self.step_over(num_samples, num_tokens)
        self.skipped += outcome.skipped
        self.nan += outcome.is_nan

    def step_over(self, num_samples: int, num_tokens: int) -> None:
        """Counts a step whose batch is left out; the arguments are those of `advance`."""
        self.iteration += 1
        self.consumed_samples += num_samples
        self.consumed_tokens += num_tokens

    def leaves_out(self, num_samples: int) -> bool:
        """Returns whether the next batch, of `num_samples` samples, has one that is left out.

        Batches may have been of another size when samples were left out.
        """
        start, stop = self.consumed_samples, self.consumed_samples + num_samples
        return any(first < stop and start < behind for first, behind in self.stepped_over)

    def note_validation(self, loss: float) -> None:
        """Counts a validation; a loss that is NaN is never the best."""
        self.validated = self.iteration
        if (self.best_loss is None or loss < self.best_loss) and not math.isnan(loss):
            self.best_loss, self.best_iteration, self.without_better = loss, self.iteration, 0
        else:
            self.without_better += 1

    def forget_best(self) -> None:
        """Counts the next validation as the first one, whose loss is the lowest so far."""
        self.best_loss, self.best_iteration, self.without_better = None, 0, 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by their names, as a checkpoint holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Returns the state that `to_dict` has written."""
        left_out = values.get("stepped_over", [])
        # Older checkpoints have the first sample of each batch alone.
        spans = [(one, one + 1) if isinstance(one, int) else tuple(one) for one in left_out]
        return cls(**{**values, "stepped_over": spans})
