"""Writes in torch.save's format without having the tensors, which come one by one.

So only a few of them are in memory at a time. torch.serialization.skip_data leaves room for the
values in the (zip) file; they are filled in afterwards, together with the zip format's checksums of
them. `Archive` is a file of many tensors, and `Frame` what stands around a single one.
"""

import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor
from zlib_ng import zlib_ng

from glm3cli.checkpoint.layouts.write_plan import Final, Front
from glm3cli.checkpoint.scratch import blocks_of
from glm3cli.host.files import LargeFile

_LOCAL_HEADER = 30  # bytes before the name; the lengths of name and extra field are its last two
_CENTRAL_HEADER = 46
_CRC_IN_CENTRAL = 16
_DESCRIPTOR = b"PK\x07\x08"  # begins what follows the data of an entry
_CRC_IN_DESCRIPTOR = 4


def values_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Returns the place in a zip file at which the bytes of an entry begin."""
    file.seek(entry.header_offset + _LOCAL_HEADER - 4)
    return entry.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", file.read(4)))


def checksum(block: memoryview, before: int) -> int:
    """Returns the zip format's checksum of bytes.

    Args:
        block: The last of the bytes.
        before: The checksum of those before them; 0 if there are none.
    """
    value: int = zlib_ng.crc32(block, before)  # three times as fast as zlib's
    return value


def _checksum_places(file: BinaryIO, directory: int) -> Iterator[tuple[str, int]]:
    """Yields the names in a central directory, and where in the file their checksums stand.

    The file may be written there before the next one is asked for.

    Args:
        file: The zip file.
        directory: The first byte of its central directory.
    """
    position = directory
    while True:
        file.seek(position)
        header = file.read(_CENTRAL_HEADER)
        if header[:4] != b"PK\x01\x02":
            return
        lengths = struct.unpack("<HHH", header[28:34])
        name = file.read(lengths[0]).decode().split("/", 1)[1]
        yield name, position + _CRC_IN_CENTRAL
        position += _CENTRAL_HEADER + sum(lengths)


@dataclass(frozen=True)
class Frame:
    """What torch.save writes before and behind the values of a single tensor.

    Attributes:
        head: The bytes before the values.
        tail: The bytes behind them, with 0 for their checksum.
        places: The bytes of `tail` at which their checksum stands, of four bytes.
    """

    head: bytes
    tail: bytes
    places: tuple[int, ...]

    @classmethod
    def around(cls, shape: Sequence[int], dtype: torch.dtype) -> Self:
        """Returns what stands around a contiguous tensor of this shape and type.

        Raises:
            RuntimeError: The disk is full or failing.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "archive"  # the name that torch.save gives to what has none
            with torch.serialization.skip_data():
                torch.save(torch.empty(shape, dtype=dtype), path)  # never touched
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                [entry] = [one for one in archive.infolist() if "/data/" in one.filename]
                begin = values_offset(file, entry)
                end = begin + entry.file_size
                places = [
                    place
                    for name, place in _checksum_places(file, archive.start_dir)
                    if name == "data/0"
                ]
                file.seek(0)
                head = file.read(begin)
                file.seek(end)
                tail = file.read()
        places = [place - end for place in places]
        if tail.startswith(_DESCRIPTOR):
            places.append(_CRC_IN_DESCRIPTOR)
        return cls(head, tail, tuple(places))

    def length(self, num_bytes: int) -> int:
        """Returns the number of bytes of the whole, with so many bytes of values."""
        return len(self.head) + num_bytes + len(self.tail)

    def end(self, checksum: int) -> bytes:
        """Returns the bytes behind values that have this checksum."""
        tail = bytearray(self.tail)
        for place in self.places:
            struct.pack_into("<I", tail, place, checksum)
        return bytes(tail)


@dataclass(frozen=True)
class _Place:
    """The place of a tensor's values in a file.

    Attributes:
        number: The place among those of the file, counted from 0.
        header: The first byte of what stands before the values.
        begin: The first byte of the values.
        num_bytes: The number of their bytes.
        has_descriptor: Whether their checksum stands behind them, too.
    """

    number: int
    header: int
    begin: int
    num_bytes: int
    has_descriptor: bool


class Archive:
    """A file in torch.save's format whose tensors are filled in later, and which is then finished.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, content: Mapping[str, Any], final: Final) -> None:
        """Writes everything in `content` except the values of its tensors.

        Args:
            path: The file.
            content: What torch.save would write; its tensors may be uninitialised.
            final: Called with the file and the byte before which nothing is going to change.

        Raises:
            RuntimeError: The disk is full or failing.
        """
        with torch.serialization.skip_data():
            torch.save(content, path)
        self.path = path
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = [one for one in archive.infolist() if "/data/" in one.filename]
            entries.sort(key=lambda one: one.header_offset)
            self._places = {
                entry.filename.split("/", 1)[1]: _place_of(file, entry, number)
                for number, entry in enumerate(entries)
            }
            self._directory = archive.start_dir
        begins = [place.header for place in self._places.values()]
        self._front = Front(path, begins, self._directory, final)
        self._checksums: dict[str, int] = {}

    def fill(self, number: int, tensor: Tensor) -> None:
        """Writes the values of one tensor; several threads may do so at a time.

        Args:
            number: The place of the tensor among those of the content, counted from 0.
            tensor: The values, in the shape and type that the content has there.

        Raises:
            OSError: The disk is full or failing.
        """
        name = f"data/{number}"
        place = self._places[name]
        assert place.num_bytes == tensor.nbytes, f"{name} holds {place.num_bytes} bytes"
        assert name not in self._checksums, f"{name} was filled before"
        value, position = 0, place.begin
        with LargeFile(self.path) as file:
            for block in blocks_of(tensor):
                value = checksum(block, value)
                position = file.write(block, position)
                self._front.advance(place.number, position)
            if place.has_descriptor:
                file.write(struct.pack("<I", value), position + _CRC_IN_DESCRIPTOR)
        self._checksums[name] = value
        self._front.complete(place.number)

    def finish(self) -> None:
        """Writes the checksums into the zip file's central directory; all tensors are filled in.

        Raises:
            OSError: The disk is full or failing.
        """
        missing = self._places.keys() - self._checksums.keys()
        assert not missing, f"never filled: {sorted(missing)}"
        with self.path.open("rb") as read, LargeFile(self.path) as file:
            for name, place in _checksum_places(read, self._directory):
                if name in self._checksums:
                    file.write(struct.pack("<I", self._checksums[name]), place)


def _place_of(file: BinaryIO, entry: zipfile.ZipInfo, number: int) -> _Place:
    """Returns where the values of an entry of a zip file stand, the file's `number`-th of these."""
    begin = values_offset(file, entry)
    file.seek(begin + entry.file_size)
    has_descriptor = file.read(len(_DESCRIPTOR)) == _DESCRIPTOR
    return _Place(number, entry.header_offset, begin, entry.file_size, has_descriptor)
