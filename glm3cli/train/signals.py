"""`StopFlag`: signals, and the end of --exit-duration, as requests that all ranks agree on.

SIGTERM, SIGINT and SIGHUP, which a terminal sends when it closes, stop a run after it has saved;
SIGUSR1 makes it save and go on. It is enough that one rank gets the signal; if all do, at moments
that differ by less than a save takes, they are answered by one save.
"""

import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from glm3cli.parallel.interrupts import SAVES, accept

# Requests are numbers, the more urgent the greater: to save, to stop because --exit-duration is
# over, and to stop because of a signal, which is _SIGNAL + the signal's number.
SAVE, _DURATION, _SIGNAL = 1, 2, 100


class StopFlag:
    """Remembers what this rank was asked to do, until the ranks have agreed on it."""

    def __init__(self, device: torch.device, minutes: float | None = None) -> None:
        """Installs the handlers of the signals, and starts the clock.

        Args:
            device: The device on which the ranks exchange their requests.
            minutes: The time after which the run is asked to stop; None never asks.
        """
        self._device = device
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        # Apart, so that a signal that comes while one of them is changed can't be lost.
        self._save, self._stop = 0, 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *SAVES):
            signal.signal(number, self._remember)
        accept(SAVES)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        """Handles a signal: remembers what it asks for."""
        if number in SAVES:
            self._save = SAVE
        else:
            self._stop = _SIGNAL + number

    def agreed(self) -> int:
        """Returns the most urgent request of any rank, or 0; all ranks must call it.

        A request to save is returned until `saved` is called, a request to stop every time.
        """
        is_over = self._deadline is not None and time.monotonic() > self._deadline
        return self._most_urgent(max(self._save, self._stop, _DURATION if is_over else 0))

    def saved(self) -> None:
        """Takes this rank's request to save for answered: the present state is saved.

        Another rank may have got the same signal a moment earlier, and the ranks have agreed on
        that one. What has come since asks for no second checkpoint: no step was done meanwhile.
        """
        self._save = 0

    def is_ending(self) -> bool:
        """Returns whether any rank has been asked to stop; all ranks must call it.

        Requests to save are left for `agreed`.
        """
        return self._most_urgent(self._stop) > 0

    def _most_urgent(self, request: int) -> int:
        """Returns the greatest of the ranks' requests."""
        flag = torch.tensor([request], dtype=torch.int, device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)


def signal_details(request: int) -> dict[str, Any]:
    """Returns the details of a `signal` event: what asked the run to stop.

    Args:
        request: A request to stop.

    Returns:
        The `number` and the `name` of the signal; 0 and `--exit-duration` for the end of that time.
    """
    if request < _SIGNAL:
        return {"number": 0, "name": "--exit-duration"}
    return {"number": request - _SIGNAL, "name": signal.Signals(request - _SIGNAL).name}
