"""The function by which conversions and checks report their progress to their caller.

This room prints no progress itself: `cli/progress` shows it on a terminal.
"""

from collections.abc import Callable

# Called with what is being done ("converting", "verifying" or "checking"), the number of bytes done
# so far, and the number of bytes in all. Every kind of work begins with a call with 0 bytes done.
Report = Callable[[str, int, int], None]


def report_nothing(_what: str, _done: int, _total: int) -> None:
    """Ignores all progress; the default of functions that take a `Report`."""
