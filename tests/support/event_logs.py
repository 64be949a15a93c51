"""Reads what wandb and SwanLab write offline: LevelDB's log format with seven bytes before it."""

import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK, _HEADER = 32768, 7
_FULL, _LAST = 1, 4


def records(file: Path) -> Iterator[bytes]:
    """The records of the file, each a message of the tool's protocol buffers."""
    data, at, parts = file.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        parts += data[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
