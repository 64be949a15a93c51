"""Reads input files as chunks of rows, in bounded memory.

Lines of JSON and of text stay bytes here. The workers parse them, so that one reading process can
supply many workers.
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
from glm3cli.data.preprocess.readers import chunks
from glm3cli.data.preprocess.readers.chunks import (
    Chunk,
    ColumnChooser,
    Damage,
    columns_to_read,
    damage_as_data_error,
    group_rows,
)
from glm3cli.data.preprocess.readers.json_array import read_json_array
from glm3cli.data.preprocess.readers.tables import read_group, read_tables
from glm3cli.errors import DataError


def read_chunks(path: Path, choose: ColumnChooser) -> Iterator[Chunk]:
    """Reads one file, or standard input, as chunks.

    Args:
        path: The file, or `PIPE` for standard input, whose format follows from its beginning.
        choose: Chooses the columns to read, where the format has columns.

    Raises:
        DataError: The file is damaged, cut short, or lacks columns.
    """
    file_format = None if path == PIPE else format_of(path)
    if file_format in ("parquet", "arrow"):
        yield from read_tables(path, file_format, choose)
        return
    with damage_as_data_error(path), _opened(path) as (file, stream):
        if file_format is None:
            file_format = "json" if _starts(stream, b"[", b"{") else "text"
        if file_format == "csv":
            yield from group_rows(path, file, _csv_rows(path, stream, choose))
        elif file_format == "text":
            yield from _line_chunks(path, file, stream, "text")
        elif _starts(stream, b"["):
            yield from group_rows(path, file, read_json_array(stream, str(path)))
        else:
            yield from _line_chunks(path, file, stream, "json")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file; gives the file itself, for its position, and its decompressed content."""
    if path == PIPE:
        yield _open_pipe()
        return
    with path.open("rb") as file:
        if path.suffix.lower() == ".gz":
            yield file, _gunzipped(file)
        elif path.suffix.lower() == ".zst":
            yield file, _unzstd(file)
        else:
            yield file, file


def _open_pipe() -> tuple[BinaryIO, BinaryIO]:
    """Opens standard input; its first bytes say whether its content is to be decompressed.

    Returns:
        An empty file, since a pipe has no position, and the decompressed content.
    """
    no_file = io.BytesIO()
    pipe = io.BufferedReader(io.FileIO(0, closefd=False), chunks.CHUNK_BYTES)
    head = pipe.peek(4)[:4]
    if head.startswith(b"\x1f\x8b"):
        return no_file, _gunzipped(pipe)
    if head == b"\x28\xb5\x2f\xfd":
        return no_file, _unzstd(pipe)
    return no_file, pipe


def _gunzipped(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(gzip.GzipFile(fileobj=file), chunks.CHUNK_BYTES)


def _unzstd(file: BinaryIO) -> BinaryIO:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return io.BufferedReader(stream, chunks.CHUNK_BYTES)


def _starts(stream: BinaryIO, *marks: bytes) -> bool:
    """Returns whether the content begins, after white space, with one of `marks`."""
    try:
        head = stream.peek(64)  # type: ignore[attr-defined]
    except chunks.DAMAGE:  # reading the content raises it again
        return False
    start: bytes = head.lstrip(b"\xef\xbb\xbf").lstrip()
    return start.startswith(marks)


def _line_chunks(
    path: Path, file: BinaryIO, stream: BinaryIO, kind: Literal["json", "text"]
) -> Iterator[Chunk]:
    """Reads a file of lines as chunks; the position of `file` is that of the chunks."""
    first = 1
    for lines in _blocks_of_lines(stream):
        if first == 1:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        for start in range(0, len(lines), chunks.CHUNK_ROWS):
            group = lines[start : start + chunks.CHUNK_ROWS]
            yield Chunk(str(path), first, kind, group, file.tell())
            first += len(group)


def _blocks_of_lines(stream: BinaryIO) -> Iterator[list[bytes]]:
    """Yields all lines in blocks, also those that precede damage within a block."""
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
    """Returns the lines from `position` on, as far as a damaged gzip file can be decompressed."""
    lines: list[bytes] = []
    unzipped = getattr(stream, "raw", None)
    if isinstance(unzipped, gzip.GzipFile):
        # A pipe can't be read again, which is an OSError, too: its lines are lost.
        with contextlib.suppress(*chunks.DAMAGE):
            unzipped.seek(position)
            while line := unzipped.readline():
                lines.append(line)
    return lines


def _csv_rows(
    path: Path, stream: BinaryIO, choose: ColumnChooser
) -> Iterator[dict[str, str | None]]:
    """Yields the chosen columns of every row of a CSV file."""
    csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 kB
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, strict=True)
    if not reader.fieldnames:
        raise DataError(f"{path} is empty", "give a CSV file with a line of column names")
    names = columns_to_read(path, choose, reader.fieldnames)
    for row in reader:
        yield {name: row[name] for name in names}
    text.detach()  # else the wrapper's end would close the file, whose position is still read


def rows_of(chunk: Chunk) -> list[Any]:
    """Returns the rows of a chunk, which are read now if the chunk names a row group.

    Raises:
        DataError: The file is damaged.
    """
    if isinstance(chunk, Damage):
        raise chunk.error
    return chunk.rows if chunk.kind != "group" else read_group(chunk.source, *chunk.rows)


def parse_line(kind: Literal["json", "text"], line: bytes) -> Any:
    """Parses a line into its row, a dict with the column `text` for a line of text.

    Returns:
        The row, or None for a blank line of JSON.

    Raises:
        ValueError: The line isn't UTF-8 or isn't JSON.
    """
    text = line.decode("utf-8")
    if kind == "text":
        return {"text": text.removesuffix("\n").removesuffix("\r")}
    return json.loads(text) if not text.isspace() else None
