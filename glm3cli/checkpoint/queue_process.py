"""How the process begins that megatron-core's writers report to; light, since each rank starts one.

What a spawned process is started with, it imports: from a module that knows torch, it would take
seconds.
"""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def outlive_signals_alone() -> None:
    """Ignores SIGTERM, but ends with the process that started this one, however that ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
