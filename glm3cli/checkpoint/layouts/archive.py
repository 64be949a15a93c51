"""Writes a file in torch.save's format whose tensors are filled in one by one.

So only one of them is in memory at a time. torch.serialization.skip_data leaves room for the values
in the (zip) file; they are filled in afterwards, together with the zip format's checksums of them.
"""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor
from zlib_ng import zlib_ng

from glm3cli.checkpoint.layouts.write_plan import Final
from glm3cli.checkpoint.scratch import blocks_of
from glm3cli.host.files import open_large

_LOCAL_HEADER = 30  # bytes before the name; the lengths of name and extra field are its last two
_CENTRAL_HEADER = 46
_CRC_IN_CENTRAL = 16
_CRC_IN_DESCRIPTOR = 4  # behind the signature that follows the data


def values_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Returns the place in a zip file at which the bytes of an entry begin."""
    file.seek(entry.header_offset + _LOCAL_HEADER - 4)
    return entry.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", file.read(4)))


class Archive:
    """A file in torch.save's format whose tensors are filled in later; use it as a context manager.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        """Writes everything in `content` except the values of its tensors.

        Args:
            path: The file.
            content: What torch.save would write; its tensors may be uninitialised.

        Raises:
            RuntimeError: The disk is full or failing.
        """
        with torch.serialization.skip_data():
            torch.save(content, path)
        self.path = path
        self._file = open_large(path, "r+b")
        with zipfile.ZipFile(self._file) as archive:
            self._entries = {
                entry.filename.split("/", 1)[1]: entry
                for entry in archive.infolist()
                if "/data/" in entry.filename
            }
            self._directory = archive.start_dir
        self._checksums: dict[str, int] = {}

    def fill(self, number: int, tensor: Tensor, final: Final) -> None:
        """Writes the values of one tensor.

        Args:
            number: The place of the tensor among those of the content, counted from 0.
            tensor: The values, in the shape and type that the content has there.
            final: Called with the file and the byte before which nothing is going to change.

        Raises:
            OSError: The disk is full or failing.
        """
        name = f"data/{number}"
        entry, first = self._entries[name], self._first_missing()
        assert entry.file_size == tensor.nbytes, f"{name} holds {entry.file_size} bytes"
        assert name not in self._checksums, f"{name} was filled before"
        self._file.seek(values_offset(self._file, entry))
        checksum = 0
        for block in blocks_of(tensor):
            checksum = zlib_ng.crc32(block, checksum)  # three times as fast as zlib's
            self._file.write(block)
            self._file.flush()
            if first == entry.header_offset:
                final(self.path, self._file.tell())
        descriptor = self._file.tell()
        if self._file.read(4) == b"PK\x07\x08":
            self._file.seek(descriptor + _CRC_IN_DESCRIPTOR)
            self._file.write(struct.pack("<I", checksum))
        self._file.flush()
        self._checksums[name] = checksum
        final(self.path, self._first_missing())

    def _first_missing(self) -> int:
        """Returns the byte of the file before which all tensors are filled in."""
        missing = (e.header_offset for n, e in self._entries.items() if n not in self._checksums)
        return min(missing, default=self._directory)

    def _write_directory(self) -> None:
        """Writes the checksums into the zip file's central directory."""
        position = self._directory
        while True:
            self._file.seek(position)
            header = self._file.read(_CENTRAL_HEADER)
            if header[:4] != b"PK\x01\x02":
                return
            lengths = struct.unpack("<HHH", header[28:34])
            name = self._file.read(lengths[0]).decode().split("/", 1)[1]
            if name in self._checksums:
                self._file.seek(position + _CRC_IN_CENTRAL)
                self._file.write(struct.pack("<I", self._checksums[name]))
            position += _CENTRAL_HEADER + sum(lengths)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                missing = self._entries.keys() - self._checksums.keys()
                assert not missing, f"never filled: {sorted(missing)}"
                self._write_directory()
