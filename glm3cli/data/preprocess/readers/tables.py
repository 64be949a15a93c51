"""Reads columnar files, parquet and Arrow, in parts and only the columns that are needed."""

import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from glm3cli.data.preprocess.readers import chunks
from glm3cli.data.preprocess.readers.arrow_values import plain_of, without_zones
from glm3cli.data.preprocess.readers.bad_rows import BadRow
from glm3cli.data.preprocess.readers.chunks import (
    Chunk,
    ColumnChooser,
    Damage,
    DamageError,
    columns_to_read,
    damage_as_data_error,
    group_rows,
)

# The largest row group, in uncompressed bytes, that a worker reads whole: so memory is bounded.
_GROUP_BYTES = 1 << 23


def read_tables(path: Path, file_format: str, choose: ColumnChooser) -> Iterator[Chunk]:
    """Reads a columnar file in parts, only the columns that are needed.

    Args:
        path: The file.
        file_format: `parquet` or `arrow`.
        choose: Chooses the columns to read.

    Yields:
        The chunks; a `Damage` for a row group or record batch that can't be read.

    Raises:
        DamageError: The file, or the rest of it, is damaged, or it lacks columns.
    """
    with damage_as_data_error(path, *_damages(), share=lambda: 1.0):
        yield from _parquet(path, choose) if file_format == "parquet" else _arrow(path, choose)


def _damages() -> tuple[type[Exception], ...]:
    """Returns what pyarrow raises for damage; the name of a column may be no UTF-8, too."""
    import pyarrow  # a fifth of a second that only these formats pay

    return (pyarrow.ArrowException, UnicodeDecodeError)


def _parquet(path: Path, choose: ColumnChooser) -> Iterator[Chunk]:
    """Yields small row groups for the workers to read, and reads large ones here in batches."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = columns_to_read(path, choose, file.schema_arrow.names)
        size, first = path.stat().st_size, 1
        for i in range(file.num_row_groups):
            group = file.metadata.row_group(i)
            position = size * (i + 1) // file.num_row_groups
            # Not the columns' sizes: pyarrow ends the process where their metadata is damaged.
            if group.total_byte_size <= _GROUP_BYTES:
                yield Chunk(str(path), first, "group", [i, names], position)
            else:
                batches = file.iter_batches(chunks.CHUNK_ROWS, [i], names, use_threads=False)
                found = _batch_chunks(path, first, batches, partial(int, position))
                yield from _or_damage(path, found, _share(file.metadata, i))
            first += group.num_rows


def _share(metadata: Any, index: int) -> float:
    """Returns the share of a row group in the rows of a parquet file, 0 to 1."""
    share: float = metadata.row_group(index).num_rows / max(1, metadata.num_rows)
    return min(1.0, max(0.0, share))  # damaged metadata may have any numbers


def _or_damage(path: Path, parts: Iterator[Chunk], share: float) -> Iterator[Chunk]:
    """Yields chunks, and a `Damage`, of a share of the file, for what can't be read of them."""
    try:
        with damage_as_data_error(path, *_damages(), share=lambda: share):
            yield from parts
    except DamageError as error:
        yield Damage(str(path), 1, "row", [], 0, error)


def read_group(source: str, index: int, names: list[str]) -> list[Any]:
    """Reads one row group of a parquet file.

    Args:
        source: The path of the file.
        index: The number of the row group, from 0.
        names: The columns to read.

    Returns:
        The rows, each a dict or a `BadRow`.

    Raises:
        DamageError: The row group is damaged.
    """
    import pyarrow.parquet

    path = Path(source)
    with (
        damage_as_data_error(path, *_damages(), share=lambda: 1.0),
        pyarrow.parquet.ParquetFile(path) as file,
    ):
        share = _share(file.metadata, index)
        with damage_as_data_error(path, *_damages(), share=lambda: share):
            return _rows(file.read_row_group(index, names, use_threads=False))


def _batch_chunks(
    path: Path, first: int, batches: Iterable[Any], position: Callable[[], int]
) -> Iterator[Chunk]:
    """Makes chunks of record batches, whose first row has the number `first` in the file."""
    for batch in batches:
        with io.BytesIO() as no_file:
            for chunk in group_rows(path, no_file, _rows(batch)):
                yield Chunk(chunk.source, first, "row", chunk.rows, position())
                first += len(chunk.rows)


def _arrow(path: Path, choose: ColumnChooser) -> Iterator[Chunk]:
    """Reads an Arrow file in its file or its streaming form (Hugging Face datasets writes that)."""
    import pyarrow

    size = path.stat().st_size
    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        names, first = columns_to_read(path, choose, reader.schema.names), 1
        # What is read after damage: the next batch of a file, but nothing of a stream.
        parts: list[Iterable[Any]] = [reader]
        if is_file:
            parts = [map(reader.get_batch, [i]) for i in range(reader.num_record_batches)]
        for part in parts:
            found = _batch_chunks(path, first, _slices(part, names), source.tell)
            share = 1 / len(parts) if is_file else 1 - source.tell() / size
            for chunk in _or_damage(path, found, share):
                yield chunk
                first = max(first, chunk.first + len(chunk.rows))


def _slices(batches: Iterable[Any], names: list[str]) -> Iterator[Any]:
    """Yields the chosen columns of record batches in parts of `CHUNK_ROWS` rows."""
    for batch in batches:
        for start in range(0, batch.num_rows, chunks.CHUNK_ROWS):
            yield batch.slice(start, chunks.CHUNK_ROWS).select(names)


def _rows(table: Any) -> list[Any]:
    """Returns the rows of a table or record batch, each a dict.

    A row that can't be read, as where a text isn't UTF-8, is a `BadRow`.
    """
    import pyarrow

    try:
        table.validate(full=True)  # else damaged offsets would be followed
        rows: list[Any] = without_zones(table).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        if table.num_rows == 1:
            return [BadRow(f"can't be read: {error}", "")]
        return [row for i in range(table.num_rows) for row in _rows(table.slice(i, 1))]
    found = {field.name: plain for field in table.schema if (plain := plain_of(field.type))}
    for row in rows:
        row.update({name: plain(row[name]) for name, plain in found.items()})
    return rows
