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
    """Writes all tensors, shard by shard, and the index if there are several shards.

    Args:
        layout: The layout whose names the tensors get.
        folder: An empty folder.
        plan: The model, the type of every tensor, and the size of a shard.
        produce: Returns the canonical tensor of a weight; called in the order of `slots`.
        final: Called with a file and the byte before which nothing is going to change.

    Raises:
        OSError: The disk is full or failing.
    """
    shards = list(_shards(plan))
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        number = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"model{number}.safetensors"
        header = _header(layout, shard, plan)
        _write_shard(folder / name, header, shard, produce, final)
        places |= dict.fromkeys(header, name)
    if len(shards) > 1:
        total = sum(plan.num_bytes(slot) for slot in plan.dtypes)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / SAFETENSORS_INDEX).write_text(text, encoding="utf-8")


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


def _write_shard(
    path: Path, header: dict[str, object], shard: list[Slot], produce: Produce, final: Final
) -> None:
    """Writes the header and the tensors of one shard."""
    metadata = {"__metadata__": {"format": "pt"}}
    text = json.dumps(metadata | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with open_large(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for weight, layer in shard:
            for block in blocks_of(produce(weight, layer)):
                file.write(block)
                file.flush()
                final(path, file.tell())
