"""`History`: a run as metrics.jsonl tells it, in columns; report.html is made of it.

A run that goes on from an earlier checkpoint repeats steps. What counts is what happened last: a
line of step i takes back every line of step i and later.
"""

import json
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glm3cli.train.progress.phases import STEP_PHASES

COLUMNS = (
    "loss",
    "lr",
    "grad_norm",
    "loss_scale",
    "step_time",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "tflops_per_device",
    "mfu",
    "mfu_causal",
    "peak_memory_bytes",
    "consumed_tokens",
    *(f"{phase}_time" for phase in STEP_PHASES),
)
Values = list[float | None]


@dataclass
class Series:
    """Numbers by iteration, which only grows; None where there was no finite number."""

    names: tuple[str, ...]
    iterations: list[int] = field(default_factory=list)
    columns: dict[str, Values] = field(init=False)

    def __post_init__(self) -> None:
        self.columns = {name: [] for name in self.names}

    def __len__(self) -> int:
        return len(self.iterations)

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line of metrics.jsonl."""
        self.iterations.append(record["iteration"])
        for name, column in self.columns.items():
            column.append(record.get(name))

    def cut(self, iteration: int) -> None:
        """Forgets `iteration` and all that came after it."""
        if self.iterations and self.iterations[-1] >= iteration:
            end = bisect_left(self.iterations, iteration)
            del self.iterations[end:]
            for column in self.columns.values():
                del column[end:]

    def last(self, name: str) -> float | None:
        """The newest number of a column, if there is one."""
        return next((value for value in reversed(self.columns[name]) if value is not None), None)

    def total(self, name: str) -> float:
        """The sum of a column."""
        return sum(value for value in self.columns[name] if value is not None)


@dataclass(frozen=True)
class Event:
    """One event, and the iteration that the run was at."""

    kind: str
    iteration: int
    time: float | None
    details: dict[str, Any]


@dataclass
class History:
    """Steps, validations, and events of a run."""

    steps: Series = field(default_factory=lambda: Series(COLUMNS))
    validations: Series = field(default_factory=lambda: Series(("validation_loss",)))
    events: list[Event] = field(default_factory=list)
    _iteration: int = 0

    def last_event(self, kind: str) -> Event | None:
        """The newest event of a kind, if there is one."""
        return next((event for event in reversed(self.events) if event.kind == kind), None)

    @classmethod
    def read(cls, file: Path) -> "History":
        """The history in a metrics.jsonl; an empty one where there is none."""
        history = cls()
        for record in _records(file):
            history.add(record)
        return history

    def add(self, record: dict[str, Any]) -> None:
        """Adds a line of metrics.jsonl."""
        at = self._iteration = int(record.get("iteration", self._iteration))
        if "event" in record:
            self._add_event(record, at)
        elif "validation_loss" in record:
            self.validations.cut(at)
            self.validations.append(record)
        elif "loss" in record:
            self.steps.cut(at)
            self.validations.cut(at)
            self.steps.append(record)

    def _add_event(self, record: dict[str, Any], at: int) -> None:
        details = {k: v for k, v in record.items() if k not in ("event", "time")}
        kind, last = record["event"], self.events[-1:]
        if kind == "resume" and last and last[0].kind == "start":
            # Only now is it known where that start goes on.
            self.events[-1] = replace(last[0], iteration=at)
        self.events.append(Event(kind, at, record.get("time"), details))


def _records(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            with suppress(json.JSONDecodeError):  # a killed run may have left a torn line
                yield json.loads(line)
