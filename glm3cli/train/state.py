"""`State`: how far a run has come; saved and restored with the weights."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from glm3cli.train.step import StepOutcome


@dataclass
class State:
    """Progress of a run.

    Attributes:
        consumed_samples: Position in the sample stream; the next step starts here.
        skipped: Steps whose gradient overflowed.
        nan: Steps whose loss was not a finite number.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped: int = 0
    nan: int = 0

    def advance(self, outcome: StepOutcome, num_samples: int, seq_length: int) -> None:
        """Counts one step of `num_samples` samples."""
        self.iteration += 1
        self.consumed_samples += num_samples
        self.consumed_tokens += num_samples * seq_length
        self.skipped += outcome.skipped
        self.nan += not math.isfinite(outcome.loss)

    def to_dict(self) -> dict[str, int]:
        """The numbers, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The state that `to_dict` wrote."""
        return cls(**{field.name: int(values[field.name]) for field in fields(cls)})
