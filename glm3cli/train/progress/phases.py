"""`Phases`: a clock that says where the time of a run goes, by this rank's host.

Phases nest, and each second counts once: a wait for data inside the forward pass isn't forward
time. Nothing here waits for the chip. Where work is queued, its time shows up where the host next
needs a result: the losses end `forward_backward`, the new weights end `optimizer`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

import torch

Phase = Literal["data_wait", "forward_backward", "optimizer", "validation", "save", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
# The phases that a step is made of; validation and saving happen between the steps.
STEP_PHASES: tuple[Phase, ...] = ("data_wait", "forward_backward", "optimizer", "other")

Item = TypeVar("Item")


class Phases:
    """Adds up the seconds of each phase; time outside of all phases counts as `other`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Starts the clock.

        Args:
            clock: Returns the time in seconds.
        """
        self._clock = clock
        self._mark = clock()
        self._stack: list[Phase] = ["other"]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._before = dict(self._seconds)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Counts the time of the block as `name`; a profiler's trace shows it by that name."""
        self._settle()
        self._stack.append(name)
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._settle()
            self._stack.pop()

    def waits(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items, and counts the time until each of them is there as `data_wait`."""
        iterator = iter(items)
        while True:
            with self.phase("data_wait"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def begin_step(self) -> None:
        """Marks the start of a step, for `step`."""
        self._before = self.totals()

    def step(self) -> dict[Phase, float]:
        """Returns the seconds since `begin_step` by phase; their sum is the step's time."""
        now = self.totals()
        return {name: now[name] - self._before[name] for name in STEP_PHASES}

    def totals(self) -> dict[Phase, float]:
        """Returns the seconds since the start of the clock by phase."""
        self._settle()
        return dict(self._seconds)

    def _settle(self) -> None:
        """Adds the time since the last call to the innermost phase."""
        now = self._clock()
        self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now


def describe(totals: Mapping[Phase, float]) -> str:
    """Returns a line of text with the seconds and the share of each phase."""
    together = sum(totals.values()) or 1.0
    shares = [
        f"{name.replace('_', ' ')} {seconds:.1f} s ({seconds / together:.1%})"
        for name, seconds in totals.items()
    ]
    return "time: " + " | ".join(shares)
