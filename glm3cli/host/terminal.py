"""Lets a command go on when its terminal is closed, or nobody reads what it writes there."""

import io
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STDERR = 2


class _Unfailing(io.RawIOBase):
    """Writes to stderr, and drops what can't be written."""

    def writable(self) -> bool:
        """Says that it takes bytes."""
        return True

    def fileno(self) -> int:
        """Returns the descriptor."""
        return _STDERR

    def isatty(self) -> bool:
        """Says whether a terminal shows what is written."""
        return os.isatty(_STDERR)

    def write(self, data: "ReadableBuffer", /) -> int:
        """Writes all of the bytes, or drops the rest, and returns their number."""
        left = memoryview(data).cast("B")
        count = len(left)
        try:
            while left:
                left = left[os.write(_STDERR, left) :]
        except OSError:
            pass
        return count


def keep_stderr_unfailing() -> None:
    """Drops from now on what can't be written to stderr, whose reader may be gone.

    A terminal that was closed, or a `head` that has seen enough, must not end a training.
    """
    if sys.stderr is None:  # closed by the caller: what is opened next would get the messages
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDERR)
    elif sys.stderr is not sys.__stderr__:
        return  # a test's
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    unfailing = io.BufferedWriter(_Unfailing())
    # As Python itself has it, but for the file.
    sys.stderr = io.TextIOWrapper(unfailing, encoding, "backslashreplace", line_buffering=True)


def outlive_terminal_if_asked() -> None:
    """Holds SIGHUP back for good where nohup has started this process, and from all that it starts.

    Whoever sets a handler later, as torch's launcher of ranks does, would undo what nohup did. It
    must be called before there are other threads.
    """
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
