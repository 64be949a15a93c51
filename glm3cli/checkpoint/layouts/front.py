"""`Front`: how far a file is complete whose parts are written in any order."""

import threading
from collections.abc import Sequence
from pathlib import Path

from glm3cli.checkpoint.layouts.write_plan import Final


class Front:
    """Tells of a file the byte before which nothing is going to change; threads may share it."""

    def __init__(self, path: Path, begins: Sequence[int], end: int, final: Final) -> None:
        """Takes a file of which no part is written.

        Args:
            path: The file.
            begins: The first byte of each part, in their order.
            end: The byte behind the last part.
            final: Called with the file and the byte, whenever it has moved.
        """
        self._path, self._end, self._final = path, end, final
        self._missing = dict(enumerate(begins))
        self._lock = threading.Lock()

    def advance(self, number: int, place: int) -> None:
        """Takes note that the bytes of a part, counted from 0, are written up to a place."""
        with self._lock:
            if number == next(iter(self._missing)):
                self._final(self._path, place)

    def complete(self, number: int) -> None:
        """Takes note that a part is written, and won't change."""
        with self._lock:
            is_first = number == next(iter(self._missing))
            del self._missing[number]
            if is_first:  # those behind another that is being written move nothing
                self._final(self._path, next(iter(self._missing.values()), self._end))
