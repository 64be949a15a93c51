"""Reads input files as chunks of rows, in bounded memory.

Lines of JSON and of text stay bytes here. The workers parse them, so that one reading process can
supply many workers.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from glm3cli.config.preprocess import PIPE
from glm3cli.data.files import format_of
from glm3cli.data.preprocess.readers import chunks
from glm3cli.data.preprocess.readers.chunks import (
    Chunk,
    ColumnChooser,
    Damage,
    DamageError,
    damage_as_data_error,
    group_rows,
)
from glm3cli.data.preprocess.readers.csv_rows import read_csv
from glm3cli.data.preprocess.readers.json_array import read_json_array
from glm3cli.data.preprocess.readers.json_text import json_value
from glm3cli.data.preprocess.readers.tables import read_group, read_tables
from glm3cli.data.preprocess.readers.unpacked import (
    Unpacked,
    bunzipped,
    check_end,
    gunzipped,
    unxz,
    unzstd,
)
from glm3cli.errors import DataError


def read_chunks(path: Path, choose: ColumnChooser) -> Iterator[Chunk]:
    """Reads one file, or standard input, as chunks.

    Args:
        path: The file, or `PIPE` for standard input, whose format follows from its beginning.
        choose: Chooses the columns to read, where the format has columns.

    Yields:
        The chunks. A part that can't be read is a `Damage`, after which reading goes on if it can.
    """
    try:
        yield from _chunks(path, choose)
    except DamageError as error:
        yield Damage(str(path), 1, "row", [], 0, error)
    except DataError as error:
        yield Damage(str(path), 1, "row", [], 0, DamageError(error.message, error.hint, 1.0))


def _chunks(path: Path, choose: ColumnChooser) -> Iterator[Chunk]:
    """Yields the chunks of a file; raises DataError if the rest of it can't be read."""
    file_format = None if path == PIPE else format_of(path)
    if file_format in ("parquet", "arrow"):
        yield from read_tables(path, file_format, choose)
        return
    with (
        _opened(path) as (file, stream),
        damage_as_data_error(path, share=lambda: _share_left(path, file)),
    ):
        if _starts(stream, *_UTF_16):
            raise DamageError(f"{path} is UTF-16", "convert it with iconv -f UTF-16 -t UTF-8", 1.0)
        if file_format is None:
            file_format = "json" if _starts(stream, b"[", b"{") else "text"
        if file_format in ("csv", "tsv"):
            separator = "," if file_format == "csv" else "\t"
            yield from group_rows(path, file, read_csv(path, stream, choose, separator))
        elif file_format == "text":
            yield from _line_chunks(path, file, stream, "text")
        elif _starts(stream, b"["):
            yield from group_rows(path, file, read_json_array(stream, str(path)))
        elif _starts(stream, b"{\n", b"{\r\n"):
            raise DamageError(
                f"{path} has JSON objects of several lines each, and no list around them",
                f"jq -c . {path} > NEW.jsonl makes a line of each",
                1.0,
            )
        else:
            yield from _line_chunks(path, file, stream, "json")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file; gives the file itself, for its position, and its decompressed content."""
    if path == PIPE:
        yield _open_pipe()
        return
    with damage_as_data_error(path, share=lambda: 1.0):
        opened = path.open("rb")
    with opened as file:
        unpack = _UNPACK.get(path.suffix.lower())
        with damage_as_data_error(path, share=lambda: 1.0):
            head = file.peek(4)[:4] if unpack else b""
        if head and _packed_by(head) is not unpack:
            raise DamageError(
                f"{path} isn't packed as its name says: it begins with {head!r}",
                f"name it without {path.suffix}, or by how it is packed",
                1.0,
            )
        yield file, unpack(file, chunks.CHUNK_BYTES) if unpack else file


def _share_left(path: Path, file: BinaryIO) -> float | None:
    """Returns the share of a file behind its position; None at its end, and for a pipe."""
    size = path.stat().st_size if path.is_file() else 0
    left = size - file.tell()
    return left / size if left > 0 else None


def _open_pipe() -> tuple[BinaryIO, BinaryIO]:
    """Opens standard input; its first bytes say whether its content is to be decompressed.

    Returns:
        An empty file, since a pipe has no position, and the decompressed content.
    """
    no_file = io.BytesIO()
    # Python code is called for every read, so that signals are answered before one that waits.
    pipe = io.BufferedReader(Unpacked(partial(os.read, 0)), chunks.CHUNK_BYTES)
    unpack = _packed_by(pipe.peek(4)[:4])
    return no_file, unpack(pipe, chunks.CHUNK_BYTES) if unpack else pipe


def _packed_by(head: bytes) -> Callable[[BinaryIO, int], BinaryIO] | None:
    """Returns what unpacks a content that begins with four bytes; None if it isn't packed."""
    if head[1:] == _SKIPPED:
        return unzstd
    return next((unpack for mark, unpack in _MARKS.items() if head.startswith(mark)), None)


def _starts(stream: BinaryIO, *marks: bytes) -> bool:
    """Returns whether the content begins, after white space, with one of `marks`."""
    head: bytes = stream.peek(64)  # type: ignore[attr-defined]
    start = head.lstrip(b"\xef\xbb\xbf").lstrip()
    return start.startswith(marks)


def _line_chunks(
    path: Path, file: BinaryIO, stream: BinaryIO, kind: Literal["json", "text"]
) -> Iterator[Chunk]:
    """Reads a file of lines as chunks; the position of `file` is that of the chunks."""
    first = 1
    while lines := stream.readlines(chunks.CHUNK_BYTES):
        if first == 1:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        is_last = not lines[-1].endswith(b"\n")
        end = lines.pop() if is_last else b""
        for start in range(0, len(lines), chunks.CHUNK_ROWS):
            group = lines[start : start + chunks.CHUNK_ROWS]
            yield Chunk(str(path), first, kind, group, file.tell())
            first += len(group)
        if is_last:
            check_end(stream)  # the line may be cut off
            yield Chunk(str(path), first, kind, [end], file.tell())
    check_end(stream)


def rows_of(chunk: Chunk) -> list[Any]:
    """Returns the rows of a chunk, which are read now if the chunk names a row group.

    Raises:
        DamageError: The file is damaged.
    """
    if isinstance(chunk, Damage):
        raise chunk.error
    return chunk.rows if chunk.kind != "group" else read_group(chunk.source, *chunk.rows)


def parse_line(kind: Literal["json", "text"], line: bytes) -> Any:
    """Parses a line into its row, a dict with the column `text` for a line of text.

    Returns:
        The row, or None for a blank line of JSON.

    Raises:
        ValueError: The line isn't UTF-8 (then it is a UnicodeDecodeError) or isn't JSON.
    """
    text = line.decode("utf-8")
    if kind == "text":
        return {"text": text.removesuffix("\n").removesuffix("\r")}
    return json_value(text) if text.strip() else None


_UNPACK = {".gz": gunzipped, ".zst": unzstd, ".bz2": bunzipped, ".xz": unxz}
# How a compressed content begins.
_MARKS = {b"\x1f\x8b": gunzipped, b"\x28\xb5\x2f\xfd": unzstd, b"BZh": bunzipped, b"\xfd7zX": unxz}
_SKIPPED = b"*M\x18"  # zstd's frames without content, with which pzstd begins, after any byte
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # the byte-order marks
