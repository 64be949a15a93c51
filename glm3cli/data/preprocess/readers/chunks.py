"""`Chunk`: consecutive rows of an input file that a worker encodes together."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from glm3cli.data.preprocess.readers.unpacked import DAMAGE
from glm3cli.errors import DataError

# Bytes of text that keep a worker busy for some 50 ms, so that handing them over costs little.
CHUNK_BYTES = 1 << 18
CHUNK_ROWS = 1000
_LONG_WINDOW = "requires too much memory"  # what pyarrow says of zstd's --long
# Takes the columns of a file and returns those to read; raises DataError if one is missing.
ColumnChooser = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file.

    Attributes:
        source: The path of the file.
        first: The number of the first row (or line) in its file, from 1.
        kind: What `rows` holds. `json`: lines of JSON, as bytes. `text`: lines of text, as bytes.
            `row`: rows that are parsed, each a JSON value or a `BadRow`. `group`: the arguments of
            `tables.read_group` besides the path, with which the worker reads a row group of a
            parquet file itself.
        rows: The rows.
        position: How many bytes of the file were read so far, for the progress.
    """

    source: str
    first: int
    kind: Literal["json", "text", "row", "group"]
    rows: list[Any]
    position: int

    def where(self, index: int) -> str:
        """Returns what a message calls the row at `index` of the chunk: file and number."""
        number = self.first + index
        is_line = self.kind in ("json", "text")
        return f"{self.source}:{number}" if is_line else f"{self.source} row {number}"


class DamageError(DataError):
    """A file, or a part of it, can't be read.

    Attributes:
        share: The share of the file that is lost, 0 to 1; None if it can't be told, as where a file
            is cut short.
    """

    def __init__(self, message: str, hint: str = "", share: float | None = None) -> None:
        super().__init__(message, hint)
        self.share = share

    def __reduce__(self) -> tuple[type["DamageError"], tuple[Any, ...]]:
        """Pickles all attributes, so that the error reaches another process unchanged."""
        return type(self), (self.message, self.hint, self.share)


@dataclass(frozen=True)
class Damage(Chunk):
    """A chunk without rows that stands for a part of a file, or all of it, that can't be read.

    Attributes:
        error: What is wrong with the file.
    """

    error: DamageError


def group_rows(path: Path, file: BinaryIO, rows: Iterable[Any]) -> Iterator[Chunk]:
    """Groups parsed rows into chunks of about `CHUNK_BYTES`, at most `CHUNK_ROWS` rows each.

    Args:
        path: The file that the rows come from.
        file: The same file, opened; its position is that of the chunks.
        rows: The rows. If reading them fails, those before the failure are yielded first.
    """
    first, size = 1, 0
    group: list[Any] = []
    try:
        for row in rows:
            group.append(row)
            size += _rough_size(row)
            if size >= CHUNK_BYTES or len(group) == CHUNK_ROWS:
                yield Chunk(str(path), first, "row", group, file.tell())
                first, group, size = first + len(group), [], 0
    except Exception:  # the rows before the damage are good
        if group:
            yield Chunk(str(path), first, "row", group, file.tell())
        raise
    if group:
        yield Chunk(str(path), first, "row", group, file.tell())


def _rough_size(value: Any) -> int:
    """Returns about how many characters of text a JSON value holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_rough_size(item) for item in value.values())
    if isinstance(value, list):
        return sum(_rough_size(item) for item in value)
    return 8


@contextlib.contextmanager
def damage_as_data_error(
    path: Path, *also: type[Exception], share: Callable[[], float | None] = lambda: None
) -> Iterator[None]:
    """Turns what reading a damaged file raises into an error that names the file.

    Args:
        path: The file.
        also: Further exceptions that mean damage.
        share: Returns the share of the file that is lost, or None if it can't be told.

    Raises:
        DamageError: The file is damaged or can't be read.
    """
    damage: tuple[type[Exception], ...] = (*DAMAGE, *also)
    try:
        yield
    except damage as error:
        if isinstance(error, OSError) and error.errno:
            problem = f"{path}: {error.strerror}"
            raise DamageError(problem, "give a file that can be read", share()) from None
        problem = str(error).split("\n", maxsplit=1)[0]
        if _LONG_WINDOW in problem:
            raise DamageError(
                f"{path} was packed with a window above 128 MiB, which needs too much memory",
                f"pack it anew: zstd -dc --long=31 {path} | zstd -o NEW.zst",
                share(),
            ) from None
        raise DamageError(
            f"{path} is damaged or cut short: {problem}", "fetch it again", share()
        ) from None


def columns_to_read(path: Path, choose: ColumnChooser, columns: Sequence[str]) -> list[str]:
    """Returns those of a file's columns that `choose` takes.

    Raises:
        DamageError: A needed column is missing, or there twice; names the file. All of it is lost.
    """
    try:
        chosen = choose(columns)
    except DataError as error:
        raise DamageError(f"{path}: {error.message}", error.hint, 1.0) from None
    for name in chosen:
        if columns.count(name) > 1:
            raise DamageError(f"{path} has the column {name} twice", "rename one of them", 1.0)
    return chosen
