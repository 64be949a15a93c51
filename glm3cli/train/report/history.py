"""`History`: the lines of metrics.jsonl as columns, from which report.html is made.

A run that goes on from an earlier checkpoint repeats steps. The last time counts: the line of a
step replaces those of the same step and of later ones, and their validations.
"""

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from glm3cli.host.parsing import parse_json
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
    """Columns of numbers, of which each row belongs to an iteration.

    Attributes:
        names: The names of the columns that are always there.
        iterations: The iteration of each row, in increasing order.
        columns: The columns by their names; None where a number was missing or not finite.
    """

    names: tuple[str, ...]
    iterations: list[int] = field(default_factory=list)
    columns: dict[str, Values] = field(init=False)

    def __post_init__(self) -> None:
        self.columns = {name: [] for name in self.names}

    def __len__(self) -> int:
        return len(self.iterations)

    def append(self, record: dict[str, Any]) -> None:
        """Adds a row from a line of metrics.jsonl, whose iteration comes after all others.

        The means that an objective reports, whose names have a slash, become columns as they come.
        """
        for name in record:
            if "/" in name and name not in self.columns:
                self.columns[name] = [None] * len(self)
        self.iterations.append(record["iteration"])
        for name, column in self.columns.items():
            column.append(record.get(name))

    def cut(self, iteration: int) -> None:
        """Removes the rows of `iteration` and of all later ones."""
        if self.iterations and self.iterations[-1] >= iteration:
            end = bisect_left(self.iterations, iteration)
            del self.iterations[end:]
            for column in self.columns.values():
                del column[end:]

    def last(self, name: str) -> float | None:
        """Returns the last number of a column; None if it has none."""
        return next((value for value in reversed(self.columns[name]) if value is not None), None)

    def total(self, name: str) -> float:
        """Returns the sum of the numbers of a column."""
        return sum(value for value in self.columns[name] if value is not None)


@dataclass(frozen=True)
class Event:
    """An event of a run.

    Attributes:
        kind: The kind of event, such as `start` or `save`.
        iteration: The last step before the event.
        time: When it happened, in seconds since 1970 (UTC); None where that wasn't written.
        details: The other fields of its line in metrics.jsonl.
    """

    kind: str
    iteration: int
    time: float | None
    details: dict[str, Any]


@dataclass
class History:
    """The steps, validations, and events of a run.

    Attributes:
        steps: The numbers of each step, with the columns `COLUMNS`.
        validations: The loss of each validation, in the column `validation_loss`.
        events: All events in their order, also those of steps that were repeated.
    """

    steps: Series = field(default_factory=lambda: Series(COLUMNS))
    validations: Series = field(default_factory=lambda: Series(("validation_loss",)))
    events: list[Event] = field(default_factory=list)
    _iteration: int = 0

    def last_event(self, kind: str) -> Event | None:
        """Returns the last event of a kind; None if there is none."""
        return next((event for event in reversed(self.events) if event.kind == kind), None)

    @classmethod
    def read(cls, file: Path) -> "History":
        """Returns the history in a metrics.jsonl; an empty one if there is no such file."""
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
        """Adds a line about an event, which happened after step `at`."""
        details = {k: v for k, v in record.items() if k not in ("event", "time")}
        kind, last = record["event"], self.events[-1:]
        if kind == "resume" and last and last[0].kind == "start":
            # Only now is it known from where the run that started goes on.
            self.events[-1] = replace(last[0], iteration=at)
        self.events.append(Event(kind, at, record.get("time"), details))


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a metrics.jsonl, without those that aren't whole."""
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for line in lines:
            record = None
            with suppress(ValueError):  # a killed run or a failing disk may have torn a line
                record = parse_json(line.decode())
            if _is_line(record):
                yield record


def _is_line(record: Any) -> TypeGuard[dict[str, Any]]:
    """Returns whether a value of JSON is what a line of metrics.jsonl may say."""
    return (
        isinstance(record, dict)
        and isinstance(record.get("iteration", 0), int)
        and not {"iteration", "event"}.isdisjoint(record)
    )
