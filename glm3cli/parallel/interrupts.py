"""Passes Ctrl-C on to the ranks that this process has started, for a command that answers it.

torch's launcher ends all ranks when SIGINT comes, and starts them in sessions of their own, which
the terminal's Ctrl-C doesn't reach.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupts_passed_on() -> Iterator[None]:
    """Within the block, SIGINT goes to the processes that this one has started, and not to itself.

    They begin with SIGINT held back, until they call `accept_interrupts`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=_pass_on, daemon=True).start()
    try:
        yield
    finally:
        accept_interrupts()


def accept_interrupts() -> None:
    """Lets SIGINT reach this process, the one that was held back included."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _pass_on() -> None:
    """Waits for SIGINT again and again, and sends it to the processes that this one has started."""
    import psutil  # which only a chat on several ranks needs

    while True:
        signal.sigwait({signal.SIGINT})
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGINT)
