"""SHA-256 of tensors and files; of both together in one pass over what lies on the disk."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from glm3cli.checkpoint.hf_writer import bytes_of
from glm3cli.checkpoint.names import Slot, slots
from glm3cli.checkpoint.source import StoredSource

_BLOCK = 2**22


def digest(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def slot_name(slot: Slot) -> str:
    """What a manifest calls a tensor, whatever its layout."""
    return slot[0].name("chatglm", slot[1])


class FileDigests:
    """Hashes files a little at a time, in step with somebody who reads the tensors in them."""

    def __init__(self, groups: Sequence[Sequence[Path]]) -> None:
        """Takes the files in the order of reading; those of a group are read side by side."""
        self._groups = [list(group) for group in groups]
        self._hashes = {path: hashlib.sha256() for group in groups for path in group}
        self._done = dict.fromkeys(self._hashes, 0)
        self._block = memoryview(bytearray(_BLOCK))

    def advance(self, num_bytes: int) -> None:
        """Hashes the next `num_bytes` of the files."""
        while num_bytes > 0 and self._groups:
            group = self._groups[0]
            share = -(-num_bytes // len(group))
            done = [self._hash(path, share) for path in list(group)]
            num_bytes -= sum(done)
            self._groups[0] = [p for p, n in zip(group, done, strict=True) if n == share]
            if not self._groups[0]:
                self._groups.pop(0)

    def finish(self) -> dict[Path, str]:
        """Hashes the rest; the digest of every file."""
        while self._groups:
            self.advance(_BLOCK)
        return {path: value.hexdigest() for path, value in self._hashes.items()}

    def _hash(self, path: Path, num_bytes: int) -> int:
        """Hashes up to `num_bytes` more of a file; how many there were."""
        left = num_bytes
        with path.open("rb", buffering=0) as file:
            file.seek(self._done[path])
            while left and (count := file.readinto(self._block[:left])):
                self._hashes[path].update(self._block[:count])
                left -= count
        self._done[path] += num_bytes - left
        return num_bytes - left


def file_digest(path: Path) -> str:
    """The SHA-256 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_back(source: StoredSource, files: FileDigests) -> Iterator[tuple[Slot, str, int]]:
    """The digest and size of every canonical tensor, while `files` keeps pace.

    The files are hashed by a second thread, which is about where the tensors are read from: what
    one of the two reads from the disk, the other finds in memory.
    """
    with ThreadPoolExecutor(1) as pool:
        for weight, layer in slots(source.model.num_layers):
            tensor = source.read(weight, layer)
            hashing = pool.submit(files.advance, tensor.nbytes)
            value = digest(tensor)
            hashing.result()
            yield (weight, layer), value, tensor.nbytes
