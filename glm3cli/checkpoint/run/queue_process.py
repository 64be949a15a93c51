"""The process that collects the results of megatron-core's writer processes; each rank starts one.

A spawned process imports the modules of the function that it runs and of the objects that it is
sent. This module imports no torch: with it, the process would take seconds to start.
"""

import ctypes
import pickle
import signal
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def outlive_signals_alone() -> None:
    """Makes this process ignore SIGTERM, but end whenever the process that started it ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class ByteQueue:
    """A manager's queue with the methods that megatron-core calls; items cross it as pickles.

    So the manager's process need not import what the items are made of.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, item: Any) -> None:
        """Appends an item."""
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        """Takes the first item out of the queue and returns it.

        Raises:
            queue.Empty: The queue has no item.
        """
        return pickle.loads(self._queue.get_nowait())
