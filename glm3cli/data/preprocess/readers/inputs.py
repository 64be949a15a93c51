"""`Inputs`: reads the files of a run one after the other, all of them or one of N parts.

The parts cut all input at equal numbers of bytes, and each chunk of rows belongs to the part in
which it ends. A part doesn't open the files that others read whole; of a file that it begins within
it reads the rows before, too, but no worker encodes them.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from glm3cli.data.preprocess.readers.chunks import Chunk, ColumnChooser
from glm3cli.data.preprocess.readers.sources import read_chunks


@dataclass
class Place:
    """A position in the input, up to which the output holds everything.

    Attributes:
        file: The number of input files that are done.
        chunk: The number of chunks of the next input file that are done.
    """

    file: int = 0
    chunk: int = 0


class Inputs:
    """The input of a run, or a part of it.

    Attributes:
        begin: The position at which the part begins; None until it is reached.
        end: The position at which the part ends; None until it is reached.
    """

    def __init__(self, files: Sequence[Path], part: tuple[int, int] = (1, 1)) -> None:
        """Cuts the input into parts.

        Args:
            files: The input files, or a pipe, which can't be cut.
            part: The number of the part, from 1, and the number of all parts.
        """
        self.begin: Place | None = None
        self.end: Place | None = None
        self._files = files
        # Files without a size count as one byte, so that each of them belongs to a part.
        sizes = [max(1, path.stat().st_size if path.is_file() else 0) for path in files]
        self._starts = list(itertools.accumulate(sizes, initial=0))
        self._start_of: dict[str, int] = {}
        for path, start in zip(files, self._starts, strict=False):
            self._start_of.setdefault(str(path), start)
        number, count = part
        total = self._starts[-1]
        self._low, self._high = total * (number - 1) // count, total * number // count

    def chunks(self, choose: ColumnChooser, place: Place, after: deque[Place]) -> Iterator[Chunk]:
        """Yields the chunks of the part.

        Args:
            choose: Chooses the columns to read, where the format has columns.
            place: The position of the first chunk to yield.
            after: Gets the position after each chunk that is yielded.
        """
        for i, path in enumerate(self._files[place.file :], start=place.file):
            start, end = self._starts[i : i + 2]
            if end <= self._low:
                continue
            self._pass(start + 1, Place(i))
            if self.end:
                return
            done = place.chunk if i == place.file else 0
            position = start + 1
            for number, chunk in enumerate(read_chunks(path, choose)):
                position = min(max(position, start + chunk.position), end)
                self._pass(position, Place(i, number))
                if self.end:
                    return
                if position > self._low and number >= done:
                    after.append(Place(i, number + 1))
                    yield chunk
        self._pass(self._starts[-1] + 1, Place(len(self._files)))

    def _pass(self, position: int, place: Place) -> None:
        """Notes that a part begins or ends at `place`, if what follows it is in the next part.

        Args:
            position: The number of bytes of all input up to the end of what follows.
            place: The place before it.
        """
        if self.begin is None and position > self._low:
            self.begin = place
        if position > self._high:
            self.end = place

    def share(self, source: str, position: int) -> float:
        """Returns the share of the part that was read, 0 to 1, up to a position in a file.

        Args:
            source: The path of the file.
            position: The number of bytes of the file that were read.
        """
        done = self._start_of[source] + position - self._low
        return min(1.0, max(0.0, done / max(1, self._high - self._low)))
