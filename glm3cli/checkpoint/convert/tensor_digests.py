"""Computes digests of tensors (XXH3 of 128 bits), which tell whether a tensor is as it was written.

They guard against accidents, not against attackers, so a fast hash is enough: XXH3 runs at the
speed of the memory. The digests of files (SHA-256) are in `files/digests`.

xxhash keeps Python's lock while it hashes. So it gets small blocks, whose pages something else has
looked at just before: other threads don't wait while the disk is read, and the block is in the
processor's cache.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from glm3cli.checkpoint.files.digests import FileDigests
from glm3cli.checkpoint.names import Slot, slots
from glm3cli.checkpoint.scratch import Scratch, bytes_of
from glm3cli.checkpoint.source import StoredSource
from glm3cli.host.signals import started_pool

_BLOCK = 2**22  # bytes that are looked at and hashed by one call
_PAGE = 2**12


def _touch(block: Tensor) -> None:
    """Reads one byte of every page of a block, without Python's lock."""
    block.view(torch.uint8)[::_PAGE].sum()


def digest(tensor: Tensor, look: Callable[[Tensor], object] = _touch) -> str:
    """Returns the XXH3 of a tensor's bytes, as 32 hexadecimal digits.

    Args:
        tensor: The tensor.
        look: Called with every block of its values, [n], before the block is hashed; it should read
            all of the block's pages.
    """
    value = xxhash.xxh3_128()
    for block in torch.split(tensor.contiguous().view(-1), _BLOCK // tensor.itemsize):
        look(block)
        value.update(bytes_of(block))
    return value.hexdigest()


def slot_name(slot: Slot) -> str:
    """Returns the name of a tensor in a manifest: that of the chatglm layout, in every layout."""
    return slot[0].name("chatglm", slot[1])


def all_digests(source: StoredSource, files: FileDigests) -> Iterator[tuple[Slot, str, int]]:
    """Yields the slot, the digest and the size in bytes of every canonical tensor.

    A second thread hashes the files meanwhile, at about the place where the tensors are read: what
    one of the two reads from the disk, the other finds in the page cache.

    Args:
        source: The weights.
        files: Hashes the files of weights; the caller finishes it.
    """
    source.cat = Scratch().cat
    pace = Pace(source.reading_order(), lambda path, _start, end: files.advance(path, end))
    with started_pool() as pool:
        for weight, layer in slots(source.model):
            tensor = source.read(weight, layer)
            hashing = pool.submit(pace.advance, tensor.nbytes)
            value = digest(tensor)
            hashing.result()
            yield (weight, layer), value, tensor.nbytes


class Pace:
    """Goes through the bytes of files in step with a reader of the tensors in them."""

    def __init__(
        self, groups: Sequence[Sequence[Path]], step: Callable[[Path, int, int], None]
    ) -> None:
        """Takes the files and what to do with each part of them.

        Args:
            groups: The files in the order of reading; those of a group are read side by side.
            step: Called with a file, the first byte of its next part, and the byte behind the part.
        """
        self._groups = [dict.fromkeys(group, 0) for group in groups]
        self._step = step

    def advance(self, num_bytes: int) -> None:
        """Goes on by `num_bytes` bytes; stops early at the end of the last file."""
        while num_bytes > 0 and self._groups:
            group = self._groups[0]
            share = -(-num_bytes // len(group))
            for path, start in list(group.items()):
                end = min(start + share, path.stat().st_size)
                self._step(path, start, end)
                num_bytes -= end - start
                group[path] = end
                if end < start + share:
                    del group[path]
            if not group:
                self._groups.pop(0)
