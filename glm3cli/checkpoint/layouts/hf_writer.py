"""Writes a Hugging Face folder: safetensors shards of a given size, and their index.

The safetensors format (github.com/huggingface/safetensors, "Format") is written directly, since
the library needs all tensors of a shard in memory at once. A file has 8 bytes with the length of a
JSON header, the header with the type, shape and place of every tensor, then the tensors' bytes.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from glm3cli.checkpoint.layouts.hf import SAFETENSORS_DTYPES
from glm3cli.checkpoint.layouts.write_plan import Final, Produce, WritePlan
from glm3cli.checkpoint.locate import SAFETENSORS_INDEX
from glm3cli.checkpoint.names import HfLayout, Slot, slots
from glm3cli.checkpoint.scratch import blocks_of
from glm3cli.host.files import open_large

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_hf(
    layout: HfLayout, folder: Path, plan: WritePlan, produce: Produce, final: Final
) -> None:
    """Writes the headers, the index if there are several shards, and the tensors shard by shard.

    Args:
        layout: The layout whose names the tensors get.
        folder: A folder without weights.
        plan: The model, the type of every tensor, and the size of a shard.
        produce: Returns the canonical tensor of a weight; called in the order of `slots`.
        final: Called with a file and the byte before which nothing is going to change.

    Raises:
        OSError: The disk is full or failing.
    """
    shards = list(_shards(plan))
    begins: dict[Path, int] = {}
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        number = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = folder / f"model{number}.safetensors"
        header = _header(layout, shard, plan)
        begins[path] = _begin_shard(path, header, sum(plan.num_bytes(slot) for slot in shard))
        places |= dict.fromkeys(header, path.name)
    if len(shards) > 1:
        total = {"total_size": plan.total_bytes}
        index = {"metadata": total, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / SAFETENSORS_INDEX).write_text(text, encoding="utf-8")
    for (path, begin), shard in zip(begins.items(), shards, strict=True):
        _fill_shard(path, begin, shard, produce, final)


def _shards(plan: WritePlan) -> Iterator[list[Slot]]:
    """Yields the weights of every shard; one that is larger than a shard gets a file of its own."""
    shard: list[Slot] = []
    size = 0
    for slot in slots(plan.model):
        if shard and size + plan.num_bytes(slot) > plan.shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(slot)
        size += plan.num_bytes(slot)
    yield shard


def _header(layout: HfLayout, shard: list[Slot], plan: WritePlan) -> dict[str, object]:
    """Returns the header of a shard, in which the tensors of one weight follow each other."""
    header: dict[str, object] = {}
    end = 0
    for slot in shard:
        weight, layer = slot
        dtype = plan.dtypes[slot]
        for name, shape in weight.parts(layout, plan.model, layer).items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
    return header


def _begin_shard(path: Path, header: dict[str, object], num_bytes: int) -> int:
    """Writes the header of a shard, and leaves room for its tensors; returns where they begin."""
    metadata = {"__metadata__": {"format": "pt"}}
    text = json.dumps(metadata | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        begin = file.tell()
        file.truncate(begin + num_bytes)
    return begin


def _fill_shard(path: Path, begin: int, shard: list[Slot], produce: Produce, final: Final) -> None:
    """Writes the tensors of one shard, which begin at the byte `begin`."""
    size = path.stat().st_size
    with open_large(path, "r+b") as file:
        file.seek(begin)
        for weight, layer in shard:
            for block in blocks_of(produce(weight, layer)):
                file.write(block)
                file.flush()
                final(path, file.tell())
        assert file.tell() == size, f"{path.name} has room for {size} bytes"
