"""`Unpacked`: the content of a compressed file or a pipe, as far as it can be read."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

# What unpacking a damaged file raises; pyarrow raises OSError.
DAMAGE: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error, lzma.LZMAError)
# pyarrow loses what it has unpacked before the damage in the same call, so it is asked for little.
_ZSTD_BYTES = 1 << 12


class Unpacked(io.RawIOBase):
    """The content of a compressed file or a pipe; damage looks like its end until `check_end`.

    Otherwise a buffer around it would lose what precedes the damage.
    """

    def __init__(self, read: Callable[[int], bytes], limit: int | None = None) -> None:
        """Takes what reads the content.

        Args:
            read: Returns at most so many bytes of the content, b"" at its end.
            limit: The largest number of bytes to ask `read` for; None for any.
        """
        self._read, self._limit = read, limit
        self._damage: Exception | None = None

    def readable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads into a buffer; returns the number of bytes, 0 at the end and at damage."""
        if self._damage:
            return 0
        size = min(len(buffer), self._limit or len(buffer))
        try:
            data = self._read(size)
        except DAMAGE as error:
            self._damage = error
            return 0
        buffer[: len(data)] = data
        return len(data)

    def check_end(self) -> None:
        """Raises what unpacking has raised, one of `DAMAGE`, if the end was damage."""
        if self._damage:
            raise self._damage


def gunzipped(file: BinaryIO, buffer_bytes: int) -> BinaryIO:
    """Returns the content of a gzip file, with a buffer of so many bytes."""
    # read1, since read would lose what precedes the damage.
    return io.BufferedReader(Unpacked(gzip.GzipFile(fileobj=file).read1), buffer_bytes)


def bunzipped(file: BinaryIO, buffer_bytes: int) -> BinaryIO:
    """Returns the content of a bzip2 file, with a buffer of so many bytes."""
    return io.BufferedReader(Unpacked(bz2.BZ2File(file).read1), buffer_bytes)


def unxz(file: BinaryIO, buffer_bytes: int) -> BinaryIO:
    """Returns the content of an xz file, with a buffer of so many bytes."""
    return io.BufferedReader(Unpacked(lzma.LZMAFile(file).read1), buffer_bytes)


def unzstd(file: BinaryIO, buffer_bytes: int) -> BinaryIO:
    """Returns the content of a zstd file, with a buffer of so many bytes."""
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return io.BufferedReader(Unpacked(stream.read, _ZSTD_BYTES), buffer_bytes)


def check_end(stream: BinaryIO) -> None:
    """Raises, at the end of a stream, what unpacking has raised if the end was damage.

    Args:
        stream: The result of a function above, or any other file.

    Raises:
        Exception: One of `DAMAGE`.
    """
    raw = getattr(stream, "raw", None)
    if isinstance(raw, Unpacked):
        raw.check_end()
