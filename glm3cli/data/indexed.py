"""Writes token files in the format that megatron-core's IndexedDataset reads.

PREFIX.bin holds the tokens of all sequences as int32; PREFIX.idx their lengths and byte offsets,
and which sequences make a document (source of the format: MMIDIDX of Megatron-LM's
indexed_dataset.py). A writer of our own, because importing megatron takes seconds.

Both files grow under hidden names beside their target, so a run that dies leaves nothing behind
that could be taken for a result.
"""

import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
# int32 always: uint16, which megatron would take for small vocabularies, can't hold -100.
_INT32_CODE = 4
_INT32_SIZE = 4


def aside(path: Path) -> Path:
    """The hidden name under which `path` is written until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


class IndexedWriter:
    """Writes one pair of files; `finish`, then `publish`, or else `discard`."""

    def __init__(self, prefix: Path) -> None:
        self.bin_path = prefix.with_name(f"{prefix.name}.bin")
        self.idx_path = prefix.with_name(f"{prefix.name}.idx")
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._bin: BinaryIO = aside(self.bin_path).open("wb")

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._documents) - 1

    def add(self, tokens: bytes | bytearray, lengths: Sequence[int], sizes: Iterable[int]) -> None:
        """Appends documents.

        Args:
            tokens: All tokens of all sequences, int32.
            lengths: Tokens of each sequence.
            sizes: Sequences of each document.
        """
        self._bin.write(tokens)
        self._lengths.extend(lengths)
        last = self._documents[-1]
        for size in sizes:
            last += size
            self._documents.append(last)

    def finish(self) -> None:
        """Completes both files, still under their hidden names."""
        _sync(self._bin)
        lengths = np.array(self._lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * _INT32_SIZE
        header = struct.pack("<QBQQ", _VERSION, _INT32_CODE, len(lengths), len(self._documents))
        with aside(self.idx_path).open("wb") as file:
            file.write(_MAGIC + header)
            file.write(lengths.tobytes())
            file.write((ends - lengths.astype(np.int64) * _INT32_SIZE).tobytes())
            file.write(np.array(self._documents, dtype=np.int64).tobytes())
            _sync(file)

    def discard(self) -> None:
        """Removes the hidden files."""
        self._bin.close()
        aside(self.bin_path).unlink(missing_ok=True)
        aside(self.idx_path).unlink(missing_ok=True)


def publish(writers: Sequence[IndexedWriter]) -> list[Path]:
    """Gives finished files their names, the .idx last: where it is, its .bin is too."""
    for writer in writers:
        writer.idx_path.unlink(missing_ok=True)  # of an earlier run: it won't fit the new .bin
    files = [w.bin_path for w in writers] + [w.idx_path for w in writers]
    for path in files:
        aside(path).replace(path)
    return files


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
