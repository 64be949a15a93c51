"""Digests of tensors (XXH3) and of files (SHA-256).

A tensor's digest tells whether it is the one that was to be written; only accidents matter there,
and XXH3 finds them at the speed of the memory. A file's is for whoever gets the file.
"""

import hashlib
import mmap
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Self

import xxhash
from torch import Tensor

from glm3cli.checkpoint.convert.pace import Pace
from glm3cli.checkpoint.names import Slot, slots
from glm3cli.checkpoint.scratch import Scratch, bytes_of
from glm3cli.checkpoint.source import StoredSource
from glm3cli.host.signals import started_pool

_BLOCK = 2**22


def digest(tensor: Tensor) -> str:
    """The XXH3 (128 bits) of a tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(bytes_of(tensor))


def slot_name(slot: Slot) -> str:
    """What a manifest calls a tensor, whatever its layout."""
    return slot[0].name("chatglm", slot[1])


def file_digest(path: Path) -> str:
    """The SHA-256 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileDigests:
    """The SHA-256 of files that are hashed from front to back, a little at a time."""

    def __init__(self) -> None:
        self._hashes: dict[Path, hashlib._Hash] = {}
        self._done: dict[Path, int] = {}

    def advance(self, path: Path, end: int | None = None) -> None:
        """Hashes a file up to the byte `end`, or its end."""
        value = self._hashes.setdefault(path, hashlib.sha256())
        done = self._done.get(path, 0)
        size = path.stat().st_size
        end = size if end is None else min(end, size)
        if done < end:
            _update(value, path, done, end)
        self._done[path] = end

    def finish(self, paths: Iterable[Path]) -> dict[Path, str]:
        """Hashes what is left of the files; their digests."""
        found = {}
        for path in paths:
            self.advance(path)
            found[path] = self._hashes[path].hexdigest()
        return found


def _update(value: "hashlib._Hash", path: Path, start: int, end: int) -> None:
    """Hashes a part of a file through a mapping, which saves copying it out of the page cache."""
    aligned = start - start % mmap.ALLOCATIONGRANULARITY
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), end - aligned, offset=aligned, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped)[start - aligned :] as part,
    ):
        for position in range(0, len(part), _BLOCK):
            value.update(part[position : position + _BLOCK])


class Follower:
    """Hashes files while they are being written, in a thread of its own; a context manager.

    What was just written is still in the page cache, so nothing is read from the disk.
    """

    def __init__(self) -> None:
        self._digests = FileDigests()
        self._pool = started_pool()
        self._hashing: list[Future[None]] = []

    def note(self, path: Path, end: int) -> None:
        """Notes that the bytes of a file before `end` have their final values."""
        self._hashing.append(self._pool.submit(self._digests.advance, path, end))

    def finish(self, paths: Iterable[Path]) -> Future[dict[Path, str]]:
        """The digests of the files, all of which are complete."""
        return self._pool.submit(self._finish, list(paths))

    def _finish(self, paths: list[Path]) -> dict[Path, str]:
        for part in self._hashing:  # all are done: what went wrong there is raised here
            part.result()
        return self._digests.finish(paths)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def tensor_digests(source: StoredSource) -> Iterator[tuple[Slot, str, int]]:
    """The digest and size of every canonical tensor, two at a time, from the last to the first.

    Of a new model that is larger than the page cache, the end is still there.
    """
    source.cat = Scratch().cat  # a digest is all that is kept of a tensor

    def measure(slot: Slot) -> tuple[Slot, str, int]:
        tensor = source.read(*slot)
        return slot, digest(tensor), tensor.nbytes

    pool = started_pool(2)
    try:
        yield from pool.map(measure, reversed(list(slots(source.model.num_layers))))
    finally:
        pool.shutdown(cancel_futures=True)


def all_digests(source: StoredSource, files: FileDigests) -> Iterator[tuple[Slot, str, int]]:
    """The digest and size of every canonical tensor, while `files` keeps pace.

    The files are hashed by a second thread, which is about where the tensors are read from: what
    one of the two reads from the disk, the other finds in memory.
    """
    source.cat = Scratch().cat
    pace = Pace(source.reading_order(), lambda path, _start, end: files.advance(path, end))
    with started_pool() as pool:
        for weight, layer in slots(source.model.num_layers):
            tensor = source.read(weight, layer)
            hashing = pool.submit(pace.advance, tensor.nbytes)
            value = digest(tensor)
            hashing.result()
            yield (weight, layer), value, tensor.nbytes
