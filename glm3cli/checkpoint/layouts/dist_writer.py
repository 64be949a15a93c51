"""Writes weights in the dist layout: megatron-core's distributed checkpoints (torch_dist).

megatron-core's own `dist_checkpointing.save` needs a process group and all tensors in memory, and
torch.distributed.checkpoint, which it calls, says at the end alone where all that it wrote lies.
This module writes the same, one tensor at a time, and `.metadata` first.
`dist_checkpointing.load` reads it into a GPTModel at any parallel sizes.
"""

import io
import json
import os
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

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
from glm3cli.checkpoint.layouts.write_plan import Final, Front, WritePlan, Writer, alternating
from glm3cli.checkpoint.names import Slot, Stage, slots
from glm3cli.checkpoint.scratch import Scratch, blocks_of
from glm3cli.host.files import LargeFile

_FILES = ("__0_0.distcp", "__0_1.distcp")  # as the first rank of a training run names its own
_ALIGNMENT = 64  # bytes; torch.save aligns values as much within what it writes


@dataclass(frozen=True)
class _Part:
    """A weight of one layer, or the weight itself if it belongs to none.

    Attributes:
        slot: The weight and the layer.
        chunk: The place in the tensor of all layers.
        whole: The shape of that tensor.
        frame: What stands around the values.
        file: The name of the file.
        start: The first byte in the file.
        length: The number of bytes.
    """

    slot: Slot
    chunk: ChunkStorageMetadata
    whole: torch.Size
    frame: Frame
    file: str
    start: int
    length: int


class DistWriter(Writer):
    """Fills the files of weights, after it has written the metadata and the extra states."""

    def __init__(self, folder: Path, plan: WritePlan, final: Final) -> None:
        """Writes the metadata and the (empty) extra states.

        Args:
            folder: A folder without weights.
            plan: The model and the type of every tensor.
            final: Called with a file and the byte before which nothing is going to change.

        Raises:
            OSError, RuntimeError: The disk is full or failing.
        """
        torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backends |= {"common_backend": "torch", "common_backend_version": 1}
        (folder / "metadata.json").write_text(json.dumps(backends), encoding="utf-8")
        state, names = _empty_state(), list(_extra_states(plan))
        files = [list(_parts(plan, *one)) for one in _files(plan, len(names) * len(state))]
        parts = [part for file in files for part in file]
        _write_metadata(folder, plan, names, len(state), parts)
        self._model, self._cat = plan.model, Scratch().cat
        self._places: dict[Slot, tuple[Path, Front, int, _Part]] = {}
        for file in files:
            path, end = folder / file[0].file, file[-1].start + file[-1].length
            front = Front(path, [part.start for part in file], end, final)
            path.touch()
            os.truncate(path, end)
            for number, part in enumerate(file):
                self._places[part.slot] = path, front, number, part
        with LargeFile(folder / _FILES[0]) as first:
            first.write(state * len(names), 0)
        self.order = alternating([[part.slot for part in file] for file in files], plan)

    def fill(self, slot: Slot, tensor: Tensor) -> None:
        """Writes one weight, and what stands around its values, to its place."""
        path, front, number, part = self._places[slot]
        tensor = to_megatron(tensor, slot[0].cut, self._model, self._cat)
        with LargeFile(path) as file:
            value, place = 0, file.write(part.frame.head, part.start)
            for block in blocks_of(tensor):
                value = checksum(block, value)
                place = file.write(block, place)
                front.advance(number, place)
            file.write(part.frame.end(value), place)
        front.complete(number)

    def finish(self) -> None:
        """Writes nothing: what stands around the weights depends on no other weight."""


def _files(plan: WritePlan, states: int) -> Iterator[tuple[str, list[Slot], int]]:
    """Yields the name of each file, its weights, and the byte from which on they stand in it.

    Two files, as the threads of a training run's first rank write them, can be written faster than
    one.

    Args:
        plan: The sizes of the weights.
        states: The number of bytes of the extra states, which the first file begins with.
    """
    every = list(slots(plan.model))
    sizes = list(accumulate(map(plan.num_bytes, every)))
    half = max(1, bisect(sizes, sizes[-1] // 2))  # the embedding alone may be larger
    yield _FILES[0], every[:half], states
    yield _FILES[1], every[half:], 0


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


def _parts(plan: WritePlan, file: str, held: list[Slot], start: int) -> Iterator[_Part]:
    """Yields where the weights that a file has lie in it, from the byte `start` on."""
    frame_of, layers = cache(Frame.around), plan.model.num_layers
    for slot in held:
        weight, layer = slot
        shape = weight.shape(plan.model)
        offsets, sizes, whole = [0] * len(shape), list(shape), list(shape)
        if layer is not None:
            offsets, sizes, whole = [layer, *offsets], [1, *sizes], [layers, *whole]
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        frame = frame_of(chunk.sizes, plan.dtypes[slot])
        start += -start % _ALIGNMENT
        length = frame.length(plan.num_bytes(slot))
        yield _Part(slot, chunk, torch.Size(whole), frame, file, start, length)
        start += length


def _write_metadata(
    folder: Path, plan: WritePlan, names: list[str], width: int, parts: list[_Part]
) -> None:
    """Writes `.metadata`, which says where everything lies.

    Args:
        folder: The folder.
        plan: The type of every tensor.
        names: The names of the extra states, which the first file begins with.
        width: The number of bytes of each of them.
        parts: The weights.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    results = [
        _result(MetadataIndex(name), _FILES[0], number * width, width)
        for number, name in enumerate(names)
    ]
    for part in parts:
        weight, layer = part.slot
        name = weight.name("dist")
        properties = TensorProperties(dtype=plan.dtypes[part.slot])
        tensor = TensorStorageMetadata(properties, part.whole, [])
        tensors.setdefault(name, tensor).chunks.append(part.chunk)
        index = MetadataIndex(name, part.chunk.offsets, layer or 0)
        results.append(_result(index, part.file, part.start, part.length))
    states = {name: BytesStorageMetadata() for name in names}
    _Writer(folder).finish(Metadata({**states, **tensors}), [results])


def _result(index: MetadataIndex, file: str, start: int, length: int) -> WriteResult:
    """Returns torch's note of something that lies in a file."""
    return WriteResult(index, length, _StorageInfo(file, start, length))


class _Writer(FileSystemWriter):
    """A writer that leaves a random number and the folder's temporary name out of `.metadata`."""

    def storage_meta(self) -> StorageMeta:
        """Returns a note without any value, so that equal models make equal files."""
        return StorageMeta()
