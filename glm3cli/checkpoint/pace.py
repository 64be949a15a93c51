"""Goes through files in step with somebody who reads the tensors in them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

# Asked for in advance: what a disk of some GB/s reads while one large tensor is written.
_AHEAD = 2**28


class Pace:
    """Spreads numbers of bytes over files in the order in which they are read."""

    def __init__(
        self, groups: Sequence[Sequence[Path]], step: Callable[[Path, int, int], None]
    ) -> None:
        """Takes what to do with a file between two of its bytes.

        Args:
            groups: The files in the order of reading; those of a group are read side by side.
            step: Called with a file and the first byte of its next part and the byte behind it.
        """
        self._groups = [dict.fromkeys(group, 0) for group in groups]
        self._step = step

    def advance(self, num_bytes: int) -> None:
        """Goes on by `num_bytes`; what the files don't have is left out."""
        while num_bytes > 0 and self._groups:
            group = self._groups[0]
            share = -(-num_bytes // len(group))
            for path, start in list(group.items()):
                end = min(start + share, path.stat().st_size)
                self._step(path, start, end)
                num_bytes -= end - start
                group[path] = end
                if end < start + share:
                    del group[path]
            if not group:
                self._groups.pop(0)


class ReadAhead:
    """Asks the kernel for what is going to be read, some way ahead of who reads it.

    Tensors are mapped, and a mapped file is otherwise read in small pieces, one after the other.
    """

    def __init__(self, groups: Sequence[Sequence[Path]]) -> None:
        self._pace = Pace(groups, _ask_for)
        self._pace.advance(_AHEAD)

    def advance(self, num_bytes: int) -> None:
        """Notes that `num_bytes` more are being read."""
        self._pace.advance(num_bytes)


def _ask_for(path: Path, start: int, end: int) -> None:
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)
