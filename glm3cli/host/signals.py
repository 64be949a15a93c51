"""Makes SIGTERM end work on files by an exception, so that the work tidies up, and holds signals.

Training answers signals in its own way, after a save: see train/signals.py.
"""

import signal
import threading
from collections.abc import Iterator
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
