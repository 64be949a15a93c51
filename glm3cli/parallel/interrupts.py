"""Passes signals on to a rank that this process has started, for a command that answers them.

One rank is enough: it tells the others. If each got a signal by itself, one could get it after a
step and another one before. torch's launcher ends all ranks when SIGINT or SIGTERM comes, and
starts them in sessions of their own, which the terminal's Ctrl-C doesn't reach.
"""

import contextlib
import signal
import threading
from collections.abc import Collection, Iterator

Signals = Collection[signal.Signals]
SAVES = (signal.SIGUSR1,)  # makes a training save and go on


@contextlib.contextmanager
def signals_passed_on(signals: Signals) -> Iterator[None]:
    """Within the block, signals go to the first rank that this process has started, not to itself.

    All ranks begin with these signals held back, until they call `accept`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=_pass_on, args=(signals,), daemon=True).start()
    try:
        yield
    finally:
        accept(signals)


def accept(signals: Signals) -> None:
    """Lets signals reach this process, those that were held back included."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _pass_on(signals: Signals) -> None:
    """Waits for signals again and again, and sends them to the first rank of this machine."""
    import psutil  # which only commands that answer signals on several ranks need

    while True:
        number = signal.sigwait(signals)
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # such as one that has just ended
                if process.environ().get("LOCAL_RANK") == "0":
                    process.send_signal(number)
