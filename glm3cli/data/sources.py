"""Finds input files and reads them as chunks of rows, in bounded memory.

What a row means is the handlers' business. Lines of JSON and of text stay bytes here: the workers
parse them, so that reading keeps ahead of many of them.
"""

import contextlib
import csv
import gzip
import io
import json
import logging
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from glm3cli.config.preprocess import PIPE
from glm3cli.data.json_array import read_json_array
from glm3cli.errors import DataError

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
}
# What unpacking a damaged file raises; pyarrow says OSError.
_DAMAGE: tuple[type[Exception], ...] = (
    EOFError,
    OSError,
    zlib.error,
    gzip.BadGzipFile,
)
_COMPRESSED = (".gz", ".zst")
# Enough text for a worker to be busy some 50 ms, so that handing it over costs next to nothing.
CHUNK_BYTES = 1 << 18
CHUNK_ROWS = 1000
# A row group with more isn't handed over whole: the memory would not be bounded.
_GROUP_BYTES = 1 << 23

_log = logging.getLogger(__name__)

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

    def read(self) -> list[Any]:
        """The rows, read now if they are a row group.

        Raises:
            DataError: The file is damaged.
        """
        return self.rows if self.kind != "group" else _read_group(self.source, *self.rows)


@dataclass(frozen=True)
class Damage(Chunk):
    """Tells, in the place of the rest of a file, what is wrong with it."""

    error: DataError

    def read(self) -> list[Any]:
        """No rows.

        Raises:
            DataError: Always.
        """
        raise self.error


def find_files(inputs: Iterable[Path]) -> list[Path]:
    """The files that the inputs (files, folders, globs) stand for, in order.

    Raises:
        DataError: Something isn't there, or isn't of a format that can be read.
    """
    files = [file for path in inputs for file in _expand(path)]
    for file in files:
        if file != PIPE:
            format_of(file)
    return files


def format_of(path: Path) -> str:
    """The format of a file by its name.

    Raises:
        DataError: The name says nothing known.
    """
    kind = _format(path)
    if kind is None:
        known = ", ".join([*FORMATS, *(f".jsonl{suffix}" for suffix in _COMPRESSED)])
        raise DataError(f"{path} has a format that is not known", f"known are {known}")
    return kind


def read_chunks(path: Path, choose: ColumnChooser) -> Iterator[Chunk]:
    """Reads one file.

    Raises:
        DataError: The file is damaged, cut short, or lacks columns.
    """
    kind = None if path == PIPE else format_of(path)
    if kind in ("parquet", "arrow"):
        yield from _read_tables(path, kind, choose)
        return
    with _damage_named(path), _opened(path) as (raw, stream):
        if kind is None:
            kind = "json" if _starts(stream, b"[", b"{") else "text"
        if kind == "csv":
            yield from _gather(path, raw, _csv_rows(path, stream, choose))
        elif kind == "text":
            yield from _line_chunks(path, raw, stream, "text")
        elif _starts(stream, b"["):
            yield from _gather(path, raw, read_json_array(stream, str(path)))
        else:
            yield from _line_chunks(path, raw, stream, "json")


def _expand(path: Path) -> list[Path]:
    if path == PIPE:
        return [path]
    if path.is_dir():
        return _folder_files(path)
    if path.exists():
        return [path]
    if any(mark in str(path) for mark in "*?["):
        root = Path(path.anchor)
        found = root.glob(str(path.relative_to(root)))
        # As in a shell: a hidden file only where the pattern asks for one.
        hidden = path.name.startswith(".")
        files = sorted(
            name for name in found if name.is_file() and name.name.startswith(".") == hidden
        )
        if files:
            return files
        raise DataError(f"no file matches {path}", "check the pattern, and quote it in the shell")
    raise DataError(f"input {path} does not exist", "give a file, a folder or a quoted glob")


def _folder_files(folder: Path) -> list[Path]:
    """The files of the most frequent format, so that a README.txt doesn't become data."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    counts = Counter(kind for path in files if (kind := _format(path)))
    if not counts:
        raise DataError(f"folder {folder} has no file to read", f"known are {', '.join(FORMATS)}")
    (kind, most), *others = counts.most_common()
    if others and others[0][1] == most:
        raise DataError(
            f"folder {folder} has as many {kind} files as {others[0][0]} files",
            f"say which: --input '{folder}/*.SUFFIX'",
        )
    if others:
        named = ", ".join(f"{count} {name}" for name, count in others)
        _log.warning("%s: reading its %d %s files, not its %s", folder, most, kind, named)
    return [path for path in files if _format(path) == kind]


def _format(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        inner = FORMATS.get(Path(path.stem).suffix.lower())
        return None if inner in ("parquet", "arrow") else inner
    return FORMATS.get(suffix)


@contextlib.contextmanager
def _damage_named(path: Path, *also: type[Exception]) -> Iterator[None]:
    """Names the file in what reading it raises."""
    damage: tuple[type[Exception], ...] = (*_DAMAGE, csv.Error, UnicodeDecodeError, *also)
    try:
        yield
    except damage as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{path}: {error.strerror}", "give a file that can be read") from None
        problem = str(error).split("\n", maxsplit=1)[0]
        raise DataError(f"{path} is damaged or cut short: {problem}", "fetch it again") from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file; gives the file itself (for its position) and its unpacked content."""
    if path == PIPE:
        yield _open_pipe()
        return
    with path.open("rb") as raw:
        if path.suffix.lower() == ".gz":
            yield raw, _unzipped(raw)
        elif path.suffix.lower() == ".zst":
            yield raw, _unpacked(raw)
        else:
            yield raw, raw


def _open_pipe() -> tuple[BinaryIO, BinaryIO]:
    """Standard input, which has no position, and its content, unpacked by its first bytes."""
    raw, pipe = io.BytesIO(), io.BufferedReader(io.FileIO(0, closefd=False), CHUNK_BYTES)
    head = pipe.peek(4)[:4]
    if head.startswith(b"\x1f\x8b"):
        return raw, _unzipped(pipe)
    if head == b"\x28\xb5\x2f\xfd":
        return raw, _unpacked(pipe)
    return raw, pipe


def _unzipped(raw: BinaryIO) -> BinaryIO:
    return io.BufferedReader(gzip.GzipFile(fileobj=raw), CHUNK_BYTES)


def _unpacked(raw: BinaryIO) -> BinaryIO:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return io.BufferedReader(stream, CHUNK_BYTES)


def _starts(stream: BinaryIO, *marks: bytes) -> bool:
    try:
        head = stream.peek(64)  # type: ignore[attr-defined]
    except _DAMAGE:  # who reads it meets that again
        return False
    start: bytes = head.lstrip(b"\xef\xbb\xbf").lstrip()
    return start.startswith(marks)


def _line_chunks(
    path: Path, raw: BinaryIO, stream: BinaryIO, kind: Literal["json", "text"]
) -> Iterator[Chunk]:
    first = 1
    for lines in _blocks_of_lines(stream):
        if first == 1:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        for start in range(0, len(lines), CHUNK_ROWS):
            part = lines[start : start + CHUNK_ROWS]
            yield Chunk(str(path), first, kind, part, raw.tell())
            first += len(part)


def _blocks_of_lines(stream: BinaryIO) -> Iterator[list[bytes]]:
    """All lines, also those that stand before damage within a block."""
    position = 0
    while True:
        try:
            lines = stream.readlines(CHUNK_BYTES)
        except _DAMAGE:
            if lines := _lines_before_damage(stream, position):
                yield lines
            raise
        if not lines:
            return
        position += sum(map(len, lines))
        yield lines


def _lines_before_damage(stream: BinaryIO, position: int) -> list[bytes]:
    """The lines from `position` on, as far as a gzip file can be unpacked."""
    lines: list[bytes] = []
    unzipped = getattr(stream, "raw", None)
    if isinstance(unzipped, gzip.GzipFile):
        with contextlib.suppress(*_DAMAGE):  # also for a pipe, which can't be read again
            unzipped.seek(position)
            while line := unzipped.readline():
                lines.append(line)
    return lines


def _gather(path: Path, raw: BinaryIO, rows: Iterable[Any]) -> Iterator[Chunk]:
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


def _csv_rows(
    path: Path, stream: BinaryIO, choose: ColumnChooser
) -> Iterator[dict[str, str | None]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 kB
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, strict=True)
    if not reader.fieldnames:
        raise DataError(f"{path} is empty", "give a CSV file with a line of column names")
    names = _chosen(path, choose, reader.fieldnames)
    for row in reader:
        yield {name: row[name] for name in names}
    text.detach()  # or its end would close the file, whose position is still asked for


def _read_tables(path: Path, kind: str, choose: ColumnChooser) -> Iterator[Chunk]:
    """Reads a columnar file part by part, only the columns that are needed."""
    import pyarrow  # a fifth of a second that only these formats pay

    with _damage_named(path, pyarrow.ArrowException):
        yield from _parquet(path, choose) if kind == "parquet" else _arrow(path, choose)


def _parquet(path: Path, choose: ColumnChooser) -> Iterator[Chunk]:
    """The row groups, each to be read by whoever encodes it; large ones in parts, read here."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names, size, first = _chosen(path, choose, file.schema_arrow.names), path.stat().st_size, 1
        for i in range(file.num_row_groups):
            group = file.metadata.row_group(i)
            position = size * (i + 1) // file.num_row_groups
            columns = map(group.column, range(group.num_columns))
            if sum(column.total_uncompressed_size for column in columns) <= _GROUP_BYTES:
                yield Chunk(str(path), first, "group", [i, names], position)
            else:
                batches = file.iter_batches(CHUNK_ROWS, [i], names, use_threads=False)
                yield from _batch_chunks(path, first, batches, position)
            first += group.num_rows


def _read_group(source: str, index: int, names: list[str]) -> list[Any]:
    import pyarrow.parquet

    path = Path(source)
    with (
        _damage_named(path, pyarrow.ArrowException),
        pyarrow.parquet.ParquetFile(path) as file,
    ):
        rows: list[Any] = file.read_row_group(index, names, use_threads=False).to_pylist()
        return rows


def _batch_chunks(path: Path, first: int, batches: Iterable[Any], position: int) -> Iterator[Chunk]:
    for batch in batches:
        with io.BytesIO() as nowhere:
            for chunk in _gather(path, nowhere, batch.to_pylist()):
                yield Chunk(chunk.source, first, "row", chunk.rows, position)
                first += len(chunk.rows)


def _arrow(path: Path, choose: ColumnChooser) -> Iterator[Chunk]:
    """Reads either form of an Arrow file; Hugging Face datasets writes the streaming one."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        names, first = _chosen(path, choose, reader.schema.names), 1
        batches = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        )
        for batch in batches:
            parts = (
                batch.slice(start, CHUNK_ROWS).select(names)
                for start in range(0, batch.num_rows, CHUNK_ROWS)
            )
            yield from _batch_chunks(path, first, parts, source.tell())
            first += batch.num_rows


def _chosen(path: Path, choose: ColumnChooser, columns: Sequence[str]) -> list[str]:
    try:
        return choose(columns)
    except DataError as error:
        raise DataError(f"{path}: {error.message}", error.hint) from None


def parse_line(kind: Literal["json", "text"], line: bytes) -> Any:
    """Turns a line into its row; None for a blank one.

    Raises:
        ValueError: The line isn't UTF-8 or isn't JSON.
    """
    text = line.decode("utf-8")
    if kind == "text":
        return {"text": text.removesuffix("\n").removesuffix("\r")}
    return json.loads(text) if not text.isspace() else None
