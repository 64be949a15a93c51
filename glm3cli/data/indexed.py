"""Writes and reads token files in the format of megatron-core's IndexedDataset.

PREFIX.bin holds the tokens of all sequences as int32. PREFIX.idx holds the length and byte offset
of every sequence, and which sequences form a document (source of the format: MMIDIDX in
Megatron-LM's indexed_dataset.py). The writer is our own because importing megatron takes seconds,
and because this writer can resume after an interruption and holds no index in memory.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from glm3cli.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct(
    "<QBQQ"
)  # version, code of the type, number of sequences, number of documents + 1
_VERSION = 1
# Always int32: uint16, which megatron would choose for small vocabularies, can't hold -100.
_INT32_CODE = 4
_INT32_SIZE = 4
_INT64_SIZE = 8
# The types of tokens by their codes (source: DType in Megatron-LM's indexed_dataset.py).
_TYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_BLOCK = 1 << 20  # numbers that are read at a time


@dataclass(frozen=True)
class Mark:
    """A position of a writer: how much it has written.

    Attributes:
        tokens: The number of tokens.
        sequences: The number of sequences.
        documents: The number of documents.
    """

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class IndexedWriter:
    """Writes one pair of token files.

    While it writes, two more files grow beside PREFIX.bin: PREFIX.lengths, the length of every
    sequence in tokens (int32), and PREFIX.documents, the number of sequences up to the end of
    every document (int64). `finish` makes PREFIX.idx of them and leaves them in place.

    Attributes:
        bin_path: The path of the tokens.
        idx_path: The path of the index, which exists once the pair is finished.
    """

    def __init__(self, prefix: Path, mark: Mark = Mark()) -> None:
        """Begins a new pair of files, or resumes one.

        Args:
            prefix: The path of the files without `.bin` and `.idx`.
            mark: The position up to which the files of an earlier writer are to be reused; what
                they hold beyond it is cut off.

        Raises:
            ValueError: A file is missing or shorter than `mark` says.
        """
        self.bin_path, self.idx_path, self._lengths_path, self._documents_path = (
            prefix.with_name(f"{prefix.name}.{ending}")
            for ending in ("bin", "idx", "lengths", "documents")
        )
        self._mark = mark
        self._bin = _reopened(self.bin_path, mark.tokens * _INT32_SIZE)
        self._lengths = _reopened(self._lengths_path, mark.sequences * _INT32_SIZE)
        self._documents = _reopened(self._documents_path, mark.documents * _INT64_SIZE)

    def add(self, tokens: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> None:
        """Appends documents.

        Args:
            tokens: The tokens of all sequences, one after the other, int32 [number of tokens].
            lengths: The number of tokens of each sequence, int32 [number of sequences].
            sizes: The number of sequences of each document, [number of documents].
        """
        ends = self._mark.sequences + np.cumsum(sizes, dtype=np.int64)
        self._bin.write(tokens.data)
        self._lengths.write(lengths.data)
        self._documents.write(ends.data)
        self._mark = Mark(
            self._mark.tokens + len(tokens),
            self._mark.sequences + len(lengths),
            self._mark.documents + len(sizes),
        )

    def mark(self) -> Mark:
        """Waits until everything written is on the disk, and returns the position after it."""
        for file in (self._bin, self._lengths, self._documents):
            file.flush()
            os.fsync(file.fileno())
        return self._mark

    def finish(self) -> None:
        """Writes the index, which completes the pair, and closes the files."""
        self.mark()
        self.close()
        sequences, documents = self._mark.sequences, self._mark.documents
        with self.idx_path.open("wb") as file:
            header = _HEADER.pack(_VERSION, _INT32_CODE, sequences, documents + 1)
            file.write(_MAGIC + header)
            for lengths in _blocks(self._lengths_path, np.int32):
                file.write(lengths.data)
            end = 0
            for lengths in _blocks(self._lengths_path, np.int32):
                offsets = np.cumsum(lengths, dtype=np.int64) * _INT32_SIZE + end
                file.write((offsets - lengths.astype(np.int64) * _INT32_SIZE).data)
                end = int(offsets[-1])
            file.write(bytes(_INT64_SIZE))
            for ends in _blocks(self._documents_path, np.int64):
                file.write(ends.data)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Closes the files without completing the pair."""
        for file in (self._bin, self._lengths, self._documents):
            file.close()


class IndexedDocuments:
    """The documents of a finished pair of files, memory-mapped."""

    def __init__(self, prefix: Path, named: str) -> None:
        """Opens a pair of files.

        Args:
            prefix: The path of the files without `.bin` and `.idx`.
            named: What the user gave, such as `--merge FOLDER`, for the error message.

        Raises:
            DataError: The index is damaged, or the tokens are fewer than it says.
        """
        self._lengths = read_lengths(str(prefix), named)
        self._tokens = read_tokens(str(prefix), named)
        at = len(_MAGIC) + _HEADER.size + len(self._lengths) * (_INT32_SIZE + _INT64_SIZE)
        self._bounds = np.memmap(prefix.with_name(f"{prefix.name}.idx"), np.int64, "r", offset=at)
        self._taken, self._tokens_taken = 0, 0

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the next documents, as `IndexedWriter.add` takes them.

        Args:
            count: The number of documents, of which fewer may be left.
        """
        bounds = self._bounds[self._taken : self._taken + count + 1]
        lengths = self._lengths[bounds[0] : bounds[-1]]
        start = self._tokens_taken
        self._taken += len(bounds) - 1
        self._tokens_taken += int(lengths.sum(dtype=np.int64))
        return self._tokens[start : self._tokens_taken], lengths, np.diff(bounds)


def read_lengths(prefix: str, named: str) -> np.ndarray:
    """Returns the number of tokens of every sequence of a pair of files, memory-mapped.

    Args:
        prefix: The path of the files without `.bin` and `.idx`.
        named: What the user gave, such as `--data PREFIX`, for the error message.

    Returns:
        int32 [number of sequences].

    Raises:
        DataError: The index is damaged.
    """
    return _read_index(prefix, named)[0]


def read_tokens(prefix: str, named: str) -> np.ndarray:
    """Returns the tokens of all sequences of a pair of files, memory-mapped.

    Args:
        prefix: The path of the files without `.bin` and `.idx`.
        named: What the user gave, such as `--data PREFIX`, for the error message.

    Returns:
        Integers of the files' type [number of tokens].

    Raises:
        DataError: The index is damaged, or the tokens are fewer than it says.
    """
    lengths, kind = _read_index(prefix, named)
    path, tokens = Path(f"{prefix}.bin"), int(lengths.sum(dtype=np.int64))
    found, needed = path.stat().st_size, tokens * np.dtype(kind).itemsize
    if found < needed:
        raise DataError(
            f"{named}: {path} is damaged ({found:,} bytes instead of {needed:,})",
            "run `glm3 preprocess` again",
        )
    return np.memmap(path, kind, "r", shape=(tokens,)) if tokens else np.empty(0, dtype=kind)


def _read_index(prefix: str, named: str) -> tuple[np.ndarray, type[np.integer]]:
    """Returns the lengths of all sequences, memory-mapped, and the type of the tokens."""
    path = Path(f"{prefix}.idx")
    with path.open("rb") as file:
        head = file.read(len(_MAGIC) + _HEADER.size)
    is_ours = head.startswith(_MAGIC) and len(head) == len(_MAGIC) + _HEADER.size
    _, code, sequences, _ = _HEADER.unpack(head[len(_MAGIC) :]) if is_ours else (0, 0, 0, 0)
    size = len(head) + sequences * (_INT32_SIZE + _INT64_SIZE)
    if code not in _TYPES or path.stat().st_size < size:
        raise DataError(f"{named}: {path} is damaged", "run `glm3 preprocess` again")
    if not sequences:
        return np.empty(0, dtype=np.int32), _TYPES[code]
    return np.memmap(path, np.int32, "r", offset=len(head), shape=(sequences,)), _TYPES[code]


def _reopened(path: Path, size: int) -> BinaryIO:
    """Opens a file for writing after its first `size` bytes, and cuts off all others."""
    if size and (not path.exists() or path.stat().st_size < size):
        raise ValueError(f"{path} has lost what it held")
    file = path.open("r+b" if size else "wb")
    file.truncate(size)
    file.seek(size)
    return file


def _blocks(path: Path, dtype: type[np.generic]) -> Iterator[np.ndarray]:
    """Reads a file of numbers block by block, so that it needn't fit into memory."""
    with path.open("rb") as file:
        while len(numbers := np.fromfile(file, dtype, _BLOCK)):
            yield numbers
