"""Writes a Hugging Face folder: safetensors shards of a given size, and their index.

The safetensors format (github.com/huggingface/safetensors, "Format") is written directly, since
the library needs all tensors of a shard in memory at once. A file has 8 bytes with the length of a
JSON header, the header with the type, shape and place of every tensor, then the tensors' bytes.
"""

import json
import math
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from glm3cli.checkpoint.layouts.hf import SAFETENSORS_DTYPES
from glm3cli.checkpoint.layouts.write_plan import Final, Front, WritePlan, Writer, alternating
from glm3cli.checkpoint.locate import SAFETENSORS_INDEX
from glm3cli.checkpoint.names import HfLayout, Slot, slots
from glm3cli.checkpoint.scratch import blocks_of
from glm3cli.host.files import LargeFile

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class HfWriter(Writer):
    """Fills the shards, whose headers and index it writes first."""

    def __init__(self, layout: HfLayout, folder: Path, plan: WritePlan, final: Final) -> None:
        """Writes the headers, and the index if there are several shards.

        Args:
            layout: The layout whose names the tensors get.
            folder: A folder without weights.
            plan: The model, the type of every tensor, and the size of a shard.
            final: Called with a file and the byte before which nothing is going to change.

        Raises:
            OSError: The disk is full or failing.
        """
        shards = list(_shards(plan))
        self.order = alternating(shards, plan)
        self._places: dict[Slot, tuple[Path, Front, int, int]] = {}
        names: dict[str, str] = {}
        for i, shard in enumerate(shards, start=1):
            number = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            path = folder / f"model{number}.safetensors"
            header = _header(layout, shard, plan)
            sizes = [plan.num_bytes(slot) for slot in shard]
            *begins, end = accumulate(sizes, initial=_begin_shard(path, header, sum(sizes)))
            front = Front(path, begins, end, final)
            for place, slot in enumerate(shard):
                self._places[slot] = path, front, place, begins[place]
            names |= dict.fromkeys(header, path.name)
        if len(shards) > 1:
            total = {"total_size": plan.total_bytes}
            index = {"metadata": total, "weight_map": dict(sorted(names.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (folder / SAFETENSORS_INDEX).write_text(text, encoding="utf-8")

    def fill(self, slot: Slot, tensor: Tensor) -> None:
        """Writes one weight to its place."""
        path, front, number, place = self._places[slot]
        with LargeFile(path) as file:
            for block in blocks_of(tensor):
                place = file.write(block, place)
                front.advance(number, place)
        front.complete(number)

    def finish(self) -> None:
        """Writes nothing: what stands around the weights depends on no other weight."""


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
