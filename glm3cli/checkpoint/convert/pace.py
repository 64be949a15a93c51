"""Goes through files in step with somebody who reads the tensors in them."""

from collections.abc import Callable, Sequence
from pathlib import Path


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
