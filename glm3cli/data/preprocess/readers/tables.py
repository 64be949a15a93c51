"""Reads columnar files, parquet and Arrow, in parts and only the columns that are needed."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from glm3cli.data.preprocess.readers import chunks
from glm3cli.data.preprocess.readers.chunks import (
    Chunk,
    ColumnChooser,
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

    Raises:
        DataError: The file is damaged or lacks columns.
    """
    import pyarrow  # a fifth of a second that only these formats pay

    with damage_as_data_error(path, pyarrow.ArrowException):
        yield from _parquet(path, choose) if file_format == "parquet" else _arrow(path, choose)


def _parquet(path: Path, choose: ColumnChooser) -> Iterator[Chunk]:
    """Yields small row groups for the workers to read, and reads large ones here in batches."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names, size, first = (
            columns_to_read(path, choose, file.schema_arrow.names),
            path.stat().st_size,
            1,
        )
        for i in range(file.num_row_groups):
            group = file.metadata.row_group(i)
            position = size * (i + 1) // file.num_row_groups
            columns = map(group.column, range(group.num_columns))
            if sum(column.total_uncompressed_size for column in columns) <= _GROUP_BYTES:
                yield Chunk(str(path), first, "group", [i, names], position)
            else:
                batches = file.iter_batches(chunks.CHUNK_ROWS, [i], names, use_threads=False)
                yield from _batch_chunks(path, first, batches, position)
            first += group.num_rows


def read_group(source: str, index: int, names: list[str]) -> list[Any]:
    """Reads one row group of a parquet file.

    Args:
        source: The path of the file.
        index: The number of the row group, from 0.
        names: The columns to read.

    Returns:
        The rows, each a dict.

    Raises:
        DataError: The file is damaged.
    """
    import pyarrow.parquet

    path = Path(source)
    with (
        damage_as_data_error(path, pyarrow.ArrowException),
        pyarrow.parquet.ParquetFile(path) as file,
    ):
        rows: list[Any] = file.read_row_group(index, names, use_threads=False).to_pylist()
        return rows


def _batch_chunks(path: Path, first: int, batches: Iterable[Any], position: int) -> Iterator[Chunk]:
    """Makes chunks of record batches, all with the same position in the file."""
    for batch in batches:
        with io.BytesIO() as no_file:
            for chunk in group_rows(path, no_file, batch.to_pylist()):
                yield Chunk(chunk.source, first, "row", chunk.rows, position)
                first += len(chunk.rows)


def _arrow(path: Path, choose: ColumnChooser) -> Iterator[Chunk]:
    """Reads an Arrow file in its file or its streaming form (Hugging Face datasets writes that)."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        names, first = columns_to_read(path, choose, reader.schema.names), 1
        batches = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        )
        for batch in batches:
            slices = (
                batch.slice(start, chunks.CHUNK_ROWS).select(names)
                for start in range(0, batch.num_rows, chunks.CHUNK_ROWS)
            )
            yield from _batch_chunks(path, first, slices, source.tell())
            first += batch.num_rows
