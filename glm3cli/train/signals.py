"""A polite stop: SIGTERM or SIGINT on any rank ends the run on all of them after the next save."""

import signal
from types import FrameType

import torch
import torch.distributed as dist


class StopFlag:
    """Remembers a signal until the ranks have agreed on it."""

    def __init__(self) -> None:
        self._received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._received = number

    def agreed(self, device: torch.device) -> int:
        """The signal that any rank has received, or 0; every rank gets the same answer."""
        flag = torch.tensor([self._received], dtype=torch.int, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)
