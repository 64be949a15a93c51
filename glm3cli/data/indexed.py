"""Writes token files in the format that megatron-core's IndexedDataset reads.

PREFIX.bin holds the tokens of all sequences as int32; PREFIX.idx their lengths and byte offsets,
and which sequences make a document (source of the format: MMIDIDX of Megatron-LM's
indexed_dataset.py). A writer of our own, because importing megatron takes seconds, and because
this one can be taken up again where it was left, and keeps nothing in memory.
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
_HEADER = struct.Struct("<QBQQ")  # version, type, sequences, documents and 1
_VERSION = 1
# int32 always: uint16, which megatron would take for small vocabularies, can't hold -100.
_INT32_CODE = 4
_INT32_SIZE = 4
_INT64_SIZE = 8
_BLOCK = 1 << 20  # numbers


@dataclass(frozen=True)
class Mark:
    """How far a writer is: numbers of tokens, of sequences, and of documents."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class IndexedWriter:
    """Writes one pair of files, and beside them two more, of which `finish` makes the index.

    Attributes:
        bin_path: The tokens.
        idx_path: The index; there once the pair is finished.
    """

    def __init__(self, prefix: Path, mark: Mark = Mark()) -> None:
        """Begins a pair, or goes on where `mark` says.

        Raises:
            ValueError: What was marked isn't there any more.
        """
        self.bin_path, self.idx_path, self._lengths_path, self._documents_path = (
            prefix.with_name(f"{prefix.name}.{kind}")
            for kind in ("bin", "idx", "lengths", "documents")
        )
        self._mark = mark
        self._bin = _reopened(self.bin_path, mark.tokens * _INT32_SIZE)
        self._lengths = _reopened(self._lengths_path, mark.sequences * _INT32_SIZE)
        self._documents = _reopened(self._documents_path, mark.documents * _INT64_SIZE)

    def add(self, tokens: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> None:
        """Appends documents.

        Args:
            tokens: All tokens of all sequences, int32.
            lengths: Tokens of each sequence, int32.
            sizes: Sequences of each document.
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
        """How far it is, once all of that is on the disk."""
        for file in (self._bin, self._lengths, self._documents):
            file.flush()
            os.fsync(file.fileno())
        return self._mark

    def finish(self) -> None:
        """Completes the pair."""
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
        """Lets go of the files."""
        for file in (self._bin, self._lengths, self._documents):
            file.close()

    def forget_marks(self) -> None:
        """Removes what a finished pair doesn't need any more."""
        self._lengths_path.unlink(missing_ok=True)
        self._documents_path.unlink(missing_ok=True)


def read_lengths(prefix: str, named: str) -> np.ndarray:
    """Tokens of every sequence of a pair of files, mapped.

    Args:
        prefix: Of the files.
        named: What the user has called them.

    Raises:
        DataError: The index is damaged.
    """
    path = Path(f"{prefix}.idx")
    with path.open("rb") as file:
        head = file.read(len(_MAGIC) + _HEADER.size)
    is_ours = head.startswith(_MAGIC) and len(head) == len(_MAGIC) + _HEADER.size
    sequences = _HEADER.unpack(head[len(_MAGIC) :])[2] if is_ours else 0
    if not is_ours or path.stat().st_size < len(head) + sequences * (_INT32_SIZE + _INT64_SIZE):
        raise DataError(f"--data {named}: {path} is damaged", "run `glm3 preprocess` again")
    if not sequences:
        return np.empty(0, dtype=np.int32)
    return np.memmap(path, np.int32, "r", offset=len(head), shape=(sequences,))


def _reopened(path: Path, size: int) -> BinaryIO:
    """The file without what was written to it after it had `size` bytes."""
    if size and (not path.exists() or path.stat().st_size < size):
        raise ValueError(f"{path} has lost what it held")
    file = path.open("r+b" if size else "wb")
    file.truncate(size)
    file.seek(size)
    return file


def _blocks(path: Path, dtype: type[np.generic]) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(numbers := np.fromfile(file, dtype, _BLOCK)):
            yield numbers
