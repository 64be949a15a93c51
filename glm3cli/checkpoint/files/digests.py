"""Computes the SHA-256 of files: at once, a little at a time, or while they are being written.

The digests are for whoever gets the files: `sha256sum` computes the same ones.
"""

import hashlib
import mmap
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from glm3cli.host.signals import started_pool

_BLOCK = 2**22  # bytes that are hashed by one call
_AT_A_TIME = 3  # files, as many as are written at once


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits.

    Raises:
        OSError: The file can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileDigests:
    """The SHA-256 of several files, each of which is hashed from front to back in parts."""

    def __init__(self) -> None:
        self._hashes: dict[Path, hashlib._Hash] = {}
        self._done: dict[Path, int] = {}

    def advance(self, path: Path, end: int | None = None) -> None:
        """Hashes a file up to the byte `end`, or up to its end if `end` is None or beyond it."""
        value = self._hashes.setdefault(path, hashlib.sha256())
        done = self._done.get(path, 0)
        size = path.stat().st_size
        end = size if end is None else min(end, size)
        if done < end:
            _update(value, path, done, end)
            self._done[path] = end

    def finish(self, paths: Iterable[Path]) -> dict[Path, str]:
        """Hashes the rest of the files and returns the digest of each, in hexadecimal digits."""
        return {path: self.digest(path) for path in paths}

    def digest(self, path: Path) -> str:
        """Hashes the rest of a file and returns its digest, in hexadecimal digits."""
        self.advance(path)
        return self._hashes[path].hexdigest()


def _update(value: "hashlib._Hash", path: Path, start: int, end: int) -> None:
    """Adds the bytes from `start` to `end` of a file to its hash.

    The file is mapped, which saves copying it out of the page cache.
    """
    aligned = start - start % mmap.ALLOCATIONGRANULARITY
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), end - aligned, offset=aligned, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped)[start - aligned :] as part,
    ):
        for position in range(0, len(part), _BLOCK):
            value.update(part[position : position + _BLOCK])


class Follower:
    """Hashes files in other threads while they are being written; use it as a context manager.

    The bytes that were just written are still in the page cache, so the disk isn't read. SHA-256 is
    the slowest part of a conversion and goes from front to back, so three files are hashed at a
    time.
    """

    def __init__(self) -> None:
        self._digests = FileDigests()
        self._pools = [started_pool() for _ in range(_AT_A_TIME)]
        self._pool_of: dict[Path, ThreadPoolExecutor] = {}
        self._hashing: list[Future[None]] = []

    def note(self, path: Path, end: int) -> None:
        """Hashes a file up to the byte `end`; all bytes before it must have their final values."""
        self._hashing.append(self._pool(path).submit(self._digests.advance, path, end))

    def _pool(self, path: Path) -> ThreadPoolExecutor:
        """Returns the one thread that hashes a file: the three get files in turn."""
        return self._pool_of.setdefault(path, self._pools[len(self._pool_of) % _AT_A_TIME])

    def finish(self, paths: Iterable[Path]) -> Future[dict[Path, str]]:
        """Starts to hash the rest of the files, which must be complete.

        Returns:
            A future of the SHA-256 of each file, in hexadecimal digits.
        """
        rest = {path: self._pool(path).submit(self._digests.digest, path) for path in paths}
        return self._pools[0].submit(self._collect, rest)

    def _collect(self, rest: dict[Path, Future[str]]) -> dict[Path, str]:
        for part in self._hashing:  # what went wrong there is raised here
            part.result()
        return {path: value.result() for path, value in rest.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)
