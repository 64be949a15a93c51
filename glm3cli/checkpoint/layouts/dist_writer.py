"""Writes weights in the dist layout: megatron-core's distributed checkpoints (torch_dist).

megatron-core's own `dist_checkpointing.save` needs a process group and all tensors in memory. What
it writes is a torch.distributed.checkpoint with a metadata.json; this module writes the same, one
tensor at a time and without a process group. `dist_checkpointing.load` reads it into a GPTModel at
any parallel sizes.
"""

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from glm3cli.checkpoint.cuts import to_megatron
from glm3cli.checkpoint.layouts.write_plan import Final, Produce, WritePlan
from glm3cli.checkpoint.names import Slot, Stage, slots
from glm3cli.checkpoint.scratch import Scratch, bytes_of
from glm3cli.host.files import open_large


def write_dist(folder: Path, plan: WritePlan, produce: Produce, final: Final) -> None:
    """Writes the tensors, the (empty) extra states, and the two metadata files.

    Args:
        folder: A folder without weights.
        plan: The model and the type of every tensor.
        produce: Returns the canonical tensor of a weight; called in the order of `slots`.
        final: Called with a file and the byte before which nothing is going to change.

    Raises:
        OSError, RuntimeError: The disk is full or failing.
    """
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
    with warnings.catch_warnings():
        # That there is no process group is intended.
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        try:
            save(
                {},
                storage_writer=_Writer(folder),
                planner=_Planner(plan, produce, lambda: _note_written(folder, final)),
                no_dist=True,
            )
        except CheckpointException as error:  # torch's, around what went wrong here
            raise next(iter(error.failures.values()))[0] from None
    # Last, as megatron-core does: its presence says that the checkpoint is complete.
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends), encoding="utf-8")


def _note_written(folder: Path, final: Final) -> None:
    """Reports that all bytes written so far have their final values."""
    for path in folder.glob("*.distcp"):  # the one file, which is written from front to back
        final(path, path.stat().st_size)


class _Files(FileSystem):
    """The file system, with files to which whole tensors are written."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Opens a new file, and closes it when the block ends."""
        assert mode == "wb", f"a file of tensors is opened with the mode {mode}"
        with open_large(Path(path), "wb") as stream:
            yield stream


class _Writer(FileSystemWriter):
    """A writer that leaves a random number and the folder's temporary name out of `.metadata`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, thread_count=1, sync_files=False)
        self.fs = _Files()

    def storage_meta(self) -> StorageMeta:
        """Returns a note without any value, so that equal models make equal files."""
        return StorageMeta()


class _Planner(DefaultSavePlanner):
    """A planner that plans one write per weight and layer, and asks for the tensor only then."""

    def __init__(self, plan: WritePlan, produce: Produce, between: Callable[[], None]) -> None:
        """Takes the plan and two functions.

        Args:
            plan: The model and the type of every tensor.
            produce: Returns the canonical tensor of a weight.
            between: Called when a tensor has been written.
        """
        super().__init__(flatten_state_dict=False)
        self._plan, self._produce, self._between = plan, produce, between
        self._slots: dict[MetadataIndex, Slot] = {}
        self._cat = Scratch().cat

    def create_local_plan(self) -> SavePlan:
        """Returns the writes of this process, which is the only one."""
        items: list[WriteItem] = []
        layers = self._plan.model.num_layers
        for slot in slots(self._plan.model):
            items.append(self._item(slot))
            weight, layer = slot
            if weight.has_extra_state(self._plan.model) and weight.stage is Stage.LAYER:
                name = f"{weight.extra_state_name('dist')}/shard_{layer}_{layers}"
                items.append(WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO))
        self.plan = SavePlan(items)
        return self.plan

    def _item(self, slot: Slot) -> WriteItem:
        """Returns the write of one weight of one layer, as a part of a tensor of all layers."""
        weight, layer = slot
        shape, offsets = weight.shape(self._plan.model), [0] * len(weight.sizes)
        sizes, total = list(shape), list(shape)
        if layer is not None:
            offsets, sizes, total = (
                [layer, *offsets],
                [1, *sizes],
                [self._plan.model.num_layers, *total],
            )
        index = MetadataIndex(weight.name("dist"), torch.Size(offsets), layer or 0)
        self._slots[index] = slot
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        properties = TensorProperties(dtype=self._plan.dtypes[slot])
        data = TensorWriteData(chunk, properties, torch.Size(total))
        return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Returns the tensor of one planned write, or the bytes of an empty extra state."""
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            nothing: list[Any] = [None]
            torch.save(nothing, stream)
            return stream
        self._between()
        slot = self._slots[write_item.index]
        tensor = to_megatron(self._produce(*slot), slot[0].cut, self._plan.model, self._cat)
        # torch.save writes the whole storage, which may be a mapped file or a buffer.
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = _alone(tensor)
        return tensor if slot[1] is None else tensor.unsqueeze(0)


def _alone(tensor: Tensor) -> Tensor:
    """Returns a tensor with the same memory, whose storage holds nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(bytes_of(tensor), dtype=tensor.dtype).view(tensor.shape)
