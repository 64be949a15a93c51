"""A polite stop: a signal on any rank, or the end of its time, is a request to all of them.

SIGTERM and SIGINT end the run after a save, SIGUSR1 saves and goes on.
"""

import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

# Requests, the more urgent the greater; that of a signal that ends the run is _SIGNAL + its number.
SAVE, _DURATION, _SIGNAL = 1, 2, 100


class StopFlag:
    """Remembers a request until the ranks have agreed on it.

    Args:
        device: Where the ranks' answers are put together.
        minutes: After which the run is asked to end.
    """

    def __init__(self, device: torch.device, minutes: float | None = None) -> None:
        self._device = device
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._requested = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        request = SAVE if number == signal.SIGUSR1 else _SIGNAL + number
        self._requested = max(self._requested, request)

    def agreed(self) -> int:
        """The most urgent request of any rank, or 0; every rank gets the same answer.

        A request to save is answered once.
        """
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._requested = max(self._requested, _DURATION)
        flag = torch.tensor([self._requested], dtype=torch.int, device=self._device)
        if self._requested == SAVE:
            self._requested = 0
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)

    def is_ending(self) -> bool:
        """Whether any rank has been asked to end; a request to save is left for `agreed`."""
        ending = self._requested if self._requested > SAVE else 0
        flag = torch.tensor([ending], dtype=torch.int, device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag) > SAVE


def described(request: int) -> dict[str, Any]:
    """The number of the signal that asks to end, and its name; the time has none."""
    if request < _SIGNAL:
        return {"number": 0, "name": "--exit-duration"}
    return {"number": request - _SIGNAL, "name": signal.Signals(request - _SIGNAL).name}
