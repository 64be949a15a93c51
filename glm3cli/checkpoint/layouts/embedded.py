"""Reads tensors that torch.save wrote somewhere within a larger file, by mapping the file."""

import io
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from glm3cli.checkpoint.layouts.archive import values_offset


class MappedFile:
    """A mapped file: only the parts that are looked at get into memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A private mapping: nothing can be written through it.
        size = path.stat().st_size
        self._bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)

    def tensor(self, start: int, length: int) -> Tensor:
        """Returns the tensor that torch.save wrote into a part of the file.

        It is a view of the mapped file if its values are aligned there, else a copy.

        Args:
            start: The first byte of the part.
            length: The number of its bytes.

        Raises:
            OSError: The file is gone.
            RuntimeError: The part isn't one tensor, or is cut short.
            zipfile.BadZipFile: The part wasn't written by torch.save.
        """
        with self._path.open("rb", buffering=0) as file:
            window = io.BufferedReader(_Window(file, start, length))
            place, size = _values(window)
            window.seek(0)
            with torch.serialization.skip_data():  # but for the values
                form: Tensor = torch.load(window, map_location="cpu", weights_only=True)
        # torch 2.7 multiplies the size of values that it skips by the element size twice.
        if not isinstance(form, Tensor) or form.untyped_storage().nbytes() not in (
            size,
            size * form.element_size(),
        ):
            raise RuntimeError("it holds something other than one tensor")
        begin = start + place
        values = self._bytes[begin : begin + size]
        if values.numel() != size:
            raise RuntimeError(f"it ends after {self._bytes.numel()} bytes")
        if begin % form.element_size():
            values = values.clone()
        stored = values.view(form.dtype)
        offset = stored.storage_offset() + form.storage_offset()
        return stored.as_strided(form.size(), form.stride(), offset)


def _values(window: BinaryIO) -> tuple[int, int]:
    """Returns the first byte and the number of bytes of the values in a torch.save file.

    Raises:
        RuntimeError: The file holds another number of tensors than one.
    """
    with zipfile.ZipFile(window) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    if len(entries) != 1 or entries[0].compress_type != zipfile.ZIP_STORED:
        raise RuntimeError("it holds something other than one tensor")
    return values_offset(window, entries[0]), entries[0].file_size


class _Window(io.RawIOBase):
    """A part of a file that can be read as if it were a file by itself."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        left = max(0, self._length - self._position)
        self._file.seek(self._start + self._position)
        count: int = self._file.readinto(memoryview(buffer)[:left])  # type: ignore[attr-defined]
        self._position += count
        return count
