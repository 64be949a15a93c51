"""Writes weights in the dist layout: megatron-core's distributed checkpoints (torch_dist).

megatron-core's own `dist_checkpointing.save` needs a process group and all tensors in memory, and
torch.distributed.checkpoint, which it calls, says at the end alone where all that it wrote lies.
This module writes the same, one tensor at a time, and `.metadata` first.
`dist_checkpointing.load` reads it into a GPTModel at any parallel sizes.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from glm3cli.checkpoint.cuts import to_megatron
from glm3cli.checkpoint.layouts.archive import Frame, checksum
from glm3cli.checkpoint.layouts.write_plan import Final, Produce, WritePlan
from glm3cli.checkpoint.names import Slot, Stage, slots
from glm3cli.checkpoint.scratch import Scratch, blocks_of
from glm3cli.host.files import open_large

_FILE = "__0_0.distcp"  # as the first rank of a training run names its own
_ALIGNMENT = 64  # bytes; torch.save aligns values as much within what it writes


@dataclass(frozen=True)
class _Part:
    """A weight of one layer, or the weight itself if it belongs to none.

    Attributes:
        slot: The weight and the layer.
        chunk: The place in the tensor of all layers.
        whole: The shape of that tensor.
        frame: What stands around the values.
        start: The first byte in the file.
        length: The number of bytes.
    """

    slot: Slot
    chunk: ChunkStorageMetadata
    whole: torch.Size
    frame: Frame
    start: int
    length: int


def write_dist(folder: Path, plan: WritePlan, produce: Produce, final: Final) -> None:
    """Writes the metadata, the (empty) extra states, and the tensors.

    Args:
        folder: A folder without weights.
        plan: The model and the type of every tensor.
        produce: Returns the canonical tensor of a weight; called in the order of `slots`.
        final: Called with a file and the byte before which nothing is going to change.

    Raises:
        OSError, RuntimeError: The disk is full or failing.
    """
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends), encoding="utf-8")
    state, names = _empty_state(), list(_extra_states(plan))
    parts = list(_parts(plan, len(names) * len(state)))
    _write_metadata(folder, plan, names, len(state), parts)
    path, cat = folder / _FILE, Scratch().cat
    with open_large(path, "wb") as file:
        file.truncate(parts[-1].start + parts[-1].length)
        file.write(state * len(names))
        for part in parts:
            weight, layer = part.slot
            tensor = to_megatron(produce(weight, layer), weight.cut, plan.model, cat)
            for _ in _write_part(file, part, tensor):
                file.flush()
                final(path, file.tell())


def _write_part(file: BinaryIO, part: _Part, tensor: Tensor) -> Iterator[None]:
    """Writes a tensor to its place, and yields now and then, the last time when all is written."""
    value = 0
    file.seek(part.start)
    file.write(part.frame.head)
    for block in blocks_of(tensor):
        yield
        value = checksum(block, value)
        file.write(block)
    file.write(part.frame.end(value))
    yield


def _empty_state() -> bytes:
    """Returns what is written for a module that has no extra state."""
    stream, nothing = io.BytesIO(), [None]
    torch.save(nothing, stream)
    return stream.getvalue()


def _extra_states(plan: WritePlan) -> Iterator[str]:
    """Yields the names of the extra states, which megatron-core expects of each layer."""
    layers = plan.model.num_layers
    for weight, layer in slots(plan.model):
        if weight.has_extra_state(plan.model) and weight.stage is Stage.LAYER:
            yield f"{weight.extra_state_name('dist')}/shard_{layer}_{layers}"


def _parts(plan: WritePlan, start: int) -> Iterator[_Part]:
    """Yields where each weight of each layer lies in the file, from the byte `start` on."""
    frame_of, layers = cache(Frame.around), plan.model.num_layers
    for slot in slots(plan.model):
        weight, layer = slot
        shape = weight.shape(plan.model)
        offsets, sizes, whole = [0] * len(shape), list(shape), list(shape)
        if layer is not None:
            offsets, sizes, whole = [layer, *offsets], [1, *sizes], [layers, *whole]
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        frame = frame_of(chunk.sizes, plan.dtypes[slot])
        start += -start % _ALIGNMENT
        length = frame.length(plan.num_bytes(slot))
        yield _Part(slot, chunk, torch.Size(whole), frame, start, length)
        start += length


def _write_metadata(
    folder: Path, plan: WritePlan, names: list[str], width: int, parts: list[_Part]
) -> None:
    """Writes `.metadata`, which says where everything lies.

    Args:
        folder: The folder.
        plan: The type of every tensor.
        names: The names of the extra states, which the file begins with.
        width: The number of bytes of each of them.
        parts: The weights.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    results = [
        _result(MetadataIndex(name), number * width, width) for number, name in enumerate(names)
    ]
    for part in parts:
        weight, layer = part.slot
        name = weight.name("dist")
        properties = TensorProperties(dtype=plan.dtypes[part.slot])
        tensor = TensorStorageMetadata(properties, part.whole, [])
        tensors.setdefault(name, tensor).chunks.append(part.chunk)
        index = MetadataIndex(name, part.chunk.offsets, layer or 0)
        results.append(_result(index, part.start, part.length))
    states = {name: BytesStorageMetadata() for name in names}
    _Writer(folder).finish(Metadata({**states, **tensors}), [results])


def _result(index: MetadataIndex, start: int, length: int) -> WriteResult:
    """Returns torch's note of something that lies in the file."""
    return WriteResult(index, length, _StorageInfo(_FILE, start, length))


class _Writer(FileSystemWriter):
    """A writer that leaves a random number and the folder's temporary name out of `.metadata`."""

    def storage_meta(self) -> StorageMeta:
        """Returns a note without any value, so that equal models make equal files."""
        return StorageMeta()
