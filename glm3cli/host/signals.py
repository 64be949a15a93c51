"""Makes SIGTERM an exception, so that work on files tidies up; holds signals back, or reads them.

Training answers signals in its own way, after a save: see train/signals.py.
"""

import signal
import socket
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType

from glm3cli.errors import StoppedError

_HELD = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stopped_by_sigterm(what: str, hint: str) -> Iterator[None]:
    """Within the block SIGTERM raises an exception, as SIGINT does by itself.

    Only the main thread can answer signals; in another one the block changes nothing.

    Args:
        what: The name of the work, for the message.
        hint: What the user can do after it was stopped.

    Raises:
        StoppedError: SIGTERM came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise StoppedError(f"{what} was stopped by SIGTERM", hint)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def signals_held() -> Iterator[None]:
    """Holds SIGTERM and SIGINT back while the block runs; one that came takes effect afterwards.

    Only the main thread can answer signals; in another one the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _frame: came.append(number))
        for number in _HELD
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def signals_read(signals: Collection[signal.Signals]) -> Iterator[socket.socket]:
    """Within the block signals do nothing but arrive at a socket, each as a byte, its number.

    Any thread can read it. A handler is of no use to one that waits for what it does: Python runs
    handlers in the main thread, and a signal that comes when that is just about to wait for a lock
    is handled after the wait.

    The numbers of other signals that have a handler in Python arrive, too. Only the main thread
    may enter the block.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in signals}
        try:
            yield reader
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)


def started_pool(count: int = 1) -> ThreadPoolExecutor:
    """Returns a pool whose `count` threads run already.

    A thread that is started later may be interrupted by a signal's exception, and then prints a
    traceback of its own.
    """
    pool, together = ThreadPoolExecutor(count), threading.Barrier(count)
    with signals_held():
        for waiting in [pool.submit(together.wait) for _ in range(count)]:
            waiting.result()
    return pool
