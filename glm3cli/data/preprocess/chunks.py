"""`Chunk`: consecutive rows of a file, which are handed to a worker together."""

import contextlib
import csv
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from glm3cli.errors import DataError

# Enough text for a worker to be busy some 50 ms, so that handing it over costs next to nothing.
CHUNK_BYTES = 1 << 18
CHUNK_ROWS = 1000
# What unpacking a damaged file raises; pyarrow says OSError.
DAMAGE: tuple[type[Exception], ...] = (
    EOFError,
    OSError,
    zlib.error,
    gzip.BadGzipFile,
)

# Given the columns of a file, those to read; raises DataError where needed ones are missing.
ColumnChooser = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file.

    Attributes:
        first: Number of the first row (or line) in its file, from 1.
        kind: What `rows` holds: lines of JSON, lines of text, mappings already, or where a row
            group of a parquet file is (its number and columns), which whoever encodes it reads.
        position: Bytes of the file read so far, for the progress.
    """

    source: str
    first: int
    kind: Literal["json", "text", "row", "group"]
    rows: list[Any]
    position: int

    def where(self, index: int) -> str:
        """Names the row at `index` for a message."""
        number = self.first + index
        is_line = self.kind in ("json", "text")
        return f"{self.source}:{number}" if is_line else f"{self.source} row {number}"


@dataclass(frozen=True)
class Damage(Chunk):
    """Tells, in the place of the rest of a file, what is wrong with it."""

    error: DataError


def gather(path: Path, raw: BinaryIO, rows: Iterable[Any]) -> Iterator[Chunk]:
    """Groups rows into chunks by a rough size, which only has to be about right."""
    first, size = 1, 0
    part: list[Any] = []
    try:
        for row in rows:
            part.append(row)
            size += _rough_size(row)
            if size >= CHUNK_BYTES or len(part) == CHUNK_ROWS:
                yield Chunk(str(path), first, "row", part, raw.tell())
                first, part, size = first + len(part), [], 0
    except Exception:  # damage: what stands before it is good
        if part:
            yield Chunk(str(path), first, "row", part, raw.tell())
        raise
    if part:
        yield Chunk(str(path), first, "row", part, raw.tell())


def _rough_size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_rough_size(item) for item in value.values())
    if isinstance(value, list):
        return sum(_rough_size(item) for item in value)
    return 8


@contextlib.contextmanager
def damage_named(path: Path, *also: type[Exception]) -> Iterator[None]:
    """Names the file in what reading it raises."""
    damage: tuple[type[Exception], ...] = (*DAMAGE, csv.Error, UnicodeDecodeError, *also)
    try:
        yield
    except damage as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{path}: {error.strerror}", "give a file that can be read") from None
        problem = str(error).split("\n", maxsplit=1)[0]
        raise DataError(f"{path} is damaged or cut short: {problem}", "fetch it again") from None


def chosen(path: Path, choose: ColumnChooser, columns: Sequence[str]) -> list[str]:
    """The columns of a file to read.

    Raises:
        DataError: Needed ones are missing; names the file.
    """
    try:
        return choose(columns)
    except DataError as error:
        raise DataError(f"{path}: {error.message}", error.hint) from None
