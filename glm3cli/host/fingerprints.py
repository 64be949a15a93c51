"""Recognises files by their content, without reading all of large ones."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import xxhash

_BLOCK = 2**20  # bytes
_BLOCKS = 256  # that are read of all files together, if they are that large


def fingerprint(files: Sequence[Path]) -> str:
    """Returns the size of files and a hash of their content, as text for a message.

    Files of up to 256 MiB in all are read whole. Of larger ones, blocks of 1 MiB are read at even
    distances, the first and the last block of each file among them. The hash covers the files'
    order and sizes, but neither their names nor the places where they are.

    Args:
        files: The files, in an order that is the same wherever they are.

    Returns:
        Text such as "1,024 bytes (5f3a...)", with the XXH3 (64 bits) in hexadecimal digits.

    Raises:
        OSError: A file can't be read.
    """
    sizes, digest = [file.stat().st_size for file in files], xxhash.xxh3_64()
    total = sum(sizes)
    share = min(1.0, _BLOCKS * _BLOCK / max(total, 1))
    for file, size in zip(files, sizes, strict=True):
        digest.update(size.to_bytes(8, "little"))
        for block in _blocks(file, _starts(size, share)):
            digest.update(block)
    return f"{total:,} bytes ({digest.hexdigest()})"


def _starts(size: int, share: float) -> Iterable[int]:
    """Returns where to read blocks of a file.

    Args:
        size: The size of the file, in bytes.
        share: The share of the file to read, from 0 to 1; two blocks are read at least.
    """
    count = max(2, math.ceil(size / _BLOCK * share))
    if size <= count * _BLOCK:
        return range(0, size, _BLOCK)
    return [(size - _BLOCK) * index // (count - 1) for index in range(count)]


def _blocks(file: Path, starts: Iterable[int]) -> Iterator[bytes]:
    """Yields the blocks of a file that begin at `starts`."""
    with file.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            yield stream.read(_BLOCK)
