"""Maps a tensor that torch.save wrote somewhere within a larger file."""

import io
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from glm3cli.checkpoint.layouts.archive import values_offset


class MappedFile:
    """A file, of which only what is looked at gets into memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A private mapping: nothing can be written through it.
        size = path.stat().st_size
        self._bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)

    def tensor(self, start: int, length: int) -> Tensor:
        """The tensor in `length` bytes of the file from `start` on; a view of them if aligned.

        Raises:
            OSError: The file is gone.
            RuntimeError: What is there isn't one tensor, or is cut short.
            zipfile.BadZipFile: What is there wasn't written by torch.save.
        """
        with self._path.open("rb", buffering=0) as file:
            window = io.BufferedReader(_Window(file, start, length))
            place, size = _values(window)
            window.seek(0)
            with torch.serialization.skip_data():  # but for the values
                form: Tensor = torch.load(window, map_location="cpu", weights_only=True)
        if not isinstance(form, Tensor) or form.untyped_storage().nbytes() != size:
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
    """Where the values of the only tensor of a torch.save file begin, and how long they are."""
    with zipfile.ZipFile(window) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    if len(entries) != 1 or entries[0].compress_type != zipfile.ZIP_STORED:
        raise RuntimeError("it holds something other than one tensor")
    return values_offset(window, entries[0]), entries[0].file_size


class _Window(io.RawIOBase):
    """A part of a file as a file."""

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
