"""Reads input files as chunks of rows, in bounded memory.

What a row means is the handlers' business. Lines of JSON and of text stay bytes here: the workers
parse them, so that reading keeps ahead of many of them.
"""

import contextlib
import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from glm3cli.config.preprocess import PIPE
from glm3cli.data.files import format_of
from glm3cli.data.preprocess import chunks
from glm3cli.data.preprocess.chunks import (
    Chunk,
    ColumnChooser,
    Damage,
    chosen,
    damage_named,
    gather,
)
from glm3cli.data.preprocess.json_array import read_json_array
from glm3cli.data.preprocess.tables import read_group, read_tables
from glm3cli.errors import DataError


def read_chunks(path: Path, choose: ColumnChooser) -> Iterator[Chunk]:
    """Reads one file.

    Raises:
        DataError: The file is damaged, cut short, or lacks columns.
    """
    kind = None if path == PIPE else format_of(path)
    if kind in ("parquet", "arrow"):
        yield from read_tables(path, kind, choose)
        return
    with damage_named(path), _opened(path) as (raw, stream):
        if kind is None:
            kind = "json" if _starts(stream, b"[", b"{") else "text"
        if kind == "csv":
            yield from gather(path, raw, _csv_rows(path, stream, choose))
        elif kind == "text":
            yield from _line_chunks(path, raw, stream, "text")
        elif _starts(stream, b"["):
            yield from gather(path, raw, read_json_array(stream, str(path)))
        else:
            yield from _line_chunks(path, raw, stream, "json")


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
    raw, pipe = io.BytesIO(), io.BufferedReader(io.FileIO(0, closefd=False), chunks.CHUNK_BYTES)
    head = pipe.peek(4)[:4]
    if head.startswith(b"\x1f\x8b"):
        return raw, _unzipped(pipe)
    if head == b"\x28\xb5\x2f\xfd":
        return raw, _unpacked(pipe)
    return raw, pipe


def _unzipped(raw: BinaryIO) -> BinaryIO:
    return io.BufferedReader(gzip.GzipFile(fileobj=raw), chunks.CHUNK_BYTES)


def _unpacked(raw: BinaryIO) -> BinaryIO:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return io.BufferedReader(stream, chunks.CHUNK_BYTES)


def _starts(stream: BinaryIO, *marks: bytes) -> bool:
    try:
        head = stream.peek(64)  # type: ignore[attr-defined]
    except chunks.DAMAGE:  # who reads it meets that again
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
        for start in range(0, len(lines), chunks.CHUNK_ROWS):
            part = lines[start : start + chunks.CHUNK_ROWS]
            yield Chunk(str(path), first, kind, part, raw.tell())
            first += len(part)


def _blocks_of_lines(stream: BinaryIO) -> Iterator[list[bytes]]:
    """All lines, also those that stand before damage within a block."""
    position = 0
    while True:
        try:
            lines = stream.readlines(chunks.CHUNK_BYTES)
        except chunks.DAMAGE:
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
        with contextlib.suppress(*chunks.DAMAGE):  # also for a pipe, which can't be read again
            unzipped.seek(position)
            while line := unzipped.readline():
                lines.append(line)
    return lines


def _csv_rows(
    path: Path, stream: BinaryIO, choose: ColumnChooser
) -> Iterator[dict[str, str | None]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 kB
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, strict=True)
    if not reader.fieldnames:
        raise DataError(f"{path} is empty", "give a CSV file with a line of column names")
    names = chosen(path, choose, reader.fieldnames)
    for row in reader:
        yield {name: row[name] for name in names}
    text.detach()  # or its end would close the file, whose position is still asked for


def rows_of(chunk: Chunk) -> list[Any]:
    """The rows of a chunk, read now if they are a row group.

    Raises:
        DataError: The file is damaged.
    """
    if isinstance(chunk, Damage):
        raise chunk.error
    return chunk.rows if chunk.kind != "group" else read_group(chunk.source, *chunk.rows)


def parse_line(kind: Literal["json", "text"], line: bytes) -> Any:
    """Turns a line into its row; None for a blank one.

    Raises:
        ValueError: The line isn't UTF-8 or isn't JSON.
    """
    text = line.decode("utf-8")
    if kind == "text":
        return {"text": text.removesuffix("\n").removesuffix("\r")}
    return json.loads(text) if not text.isspace() else None
