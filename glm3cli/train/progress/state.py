"""`State`: how far a run has come; saved and restored with the weights."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from glm3cli.train.step import StepOutcome


@dataclass
class State:
    """Progress of a run.

    Attributes:
        consumed_samples: Position in the sample stream; the next step starts here.
        skipped: Steps that left the weights as they were.
        nan: Steps whose loss or gradient was not a finite number, but for fp16's overflows.
        stepped_over: Positions of batches that are left out.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped: int = 0
    nan: int = 0
    stepped_over: list[int] = field(default_factory=list)

    def advance(self, outcome: StepOutcome, num_samples: int, seq_length: int) -> None:
        """Counts one step of `num_samples` samples."""
        self.iteration += 1
        self.consumed_samples += num_samples
        self.consumed_tokens += num_samples * seq_length
        self.skipped += outcome.skipped
        self.nan += outcome.is_nan

    def step_over(self, num_samples: int, seq_length: int) -> None:
        """Counts one step whose samples are left out."""
        self.iteration += 1
        self.consumed_samples += num_samples
        self.consumed_tokens += num_samples * seq_length

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The state that `to_dict` wrote."""
        return cls(**values)
