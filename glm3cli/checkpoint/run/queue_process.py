"""The process that megatron-core's writers report to; light, since each rank starts one.

What a spawned process is started with, and what it is sent, it imports: from a module that knows
torch, it would take seconds.
"""

import ctypes
import pickle
import signal
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def outlive_signals_alone() -> None:
    """Ignores SIGTERM, but ends with the process that started this one, however that ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class ByteQueue:
    """What megatron-core uses of a manager's queue; the manager's process sees only bytes."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, item: Any) -> None:
        """Appends an item."""
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        """Takes the first item.

        Raises:
            queue.Empty: There is none.
        """
        return pickle.loads(self._queue.get_nowait())
