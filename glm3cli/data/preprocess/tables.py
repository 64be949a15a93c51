"""Reads columnar files, parquet and Arrow, part by part and only the columns that are needed."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from glm3cli.data.preprocess import chunks
from glm3cli.data.preprocess.chunks import Chunk, ColumnChooser, chosen, damage_named, gather

# A row group with more isn't handed over whole: the memory would not be bounded.
_GROUP_BYTES = 1 << 23


def read_tables(path: Path, kind: str, choose: ColumnChooser) -> Iterator[Chunk]:
    """Reads a columnar file part by part, only the columns that are needed."""
    import pyarrow  # a fifth of a second that only these formats pay

    with damage_named(path, pyarrow.ArrowException):
        yield from _parquet(path, choose) if kind == "parquet" else _arrow(path, choose)


def _parquet(path: Path, choose: ColumnChooser) -> Iterator[Chunk]:
    """The row groups, each to be read by whoever encodes it; large ones in parts, read here."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names, size, first = chosen(path, choose, file.schema_arrow.names), path.stat().st_size, 1
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
    """The rows of one row group of a parquet file, with these columns.

    Raises:
        DataError: It is damaged.
    """
    import pyarrow.parquet

    path = Path(source)
    with (
        damage_named(path, pyarrow.ArrowException),
        pyarrow.parquet.ParquetFile(path) as file,
    ):
        rows: list[Any] = file.read_row_group(index, names, use_threads=False).to_pylist()
        return rows


def _batch_chunks(path: Path, first: int, batches: Iterable[Any], position: int) -> Iterator[Chunk]:
    for batch in batches:
        with io.BytesIO() as nowhere:
            for chunk in gather(path, nowhere, batch.to_pylist()):
                yield Chunk(chunk.source, first, "row", chunk.rows, position)
                first += len(chunk.rows)


def _arrow(path: Path, choose: ColumnChooser) -> Iterator[Chunk]:
    """Reads either form of an Arrow file; Hugging Face datasets writes the streaming one."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        names, first = chosen(path, choose, reader.schema.names), 1
        batches = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        )
        for batch in batches:
            parts = (
                batch.slice(start, chunks.CHUNK_ROWS).select(names)
                for start in range(0, batch.num_rows, chunks.CHUNK_ROWS)
            )
            yield from _batch_chunks(path, first, parts, source.tell())
            first += batch.num_rows
