"""Shows how far a conversion is, on stderr: a bar on a terminal, else a line now and then."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts bytes of weights; use it as a context manager."""

    def __init__(self, total: int, label: str) -> None:
        self._total, self._label, self._done = total, label, 0
        self._bar: Bar | None = None
        self._start = self._last = time.monotonic()

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._done == self._total:
            self._line()

    def advance(self, num_bytes: int) -> None:
        """Notes that more bytes are done."""
        self._done += num_bytes
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], num_bytes)
        elif time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._line()

    def _line(self) -> None:
        seconds = time.monotonic() - self._start
        done, total = self._done / 1e9, self._total / 1e9
        sys.stderr.write(f"{self._label}: {done:.2f} of {total:.2f} GB, {seconds:.0f} s\n")
