"""Writes Megatron's per-rank files, which Megatron-LM core_r0.6.0 and ModelLink 1.1 can load.

All files are written without values first and then filled, so that every source tensor is read once
and only a few are in memory at a time.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm3cli.checkpoint.cuts import piece_shape, pieces_of
from glm3cli.checkpoint.layouts.archive import Archive
from glm3cli.checkpoint.layouts.arguments import arguments_of
from glm3cli.checkpoint.layouts.ranks import FILE
from glm3cli.checkpoint.layouts.write_plan import Final, WritePlan, Writer, alternating
from glm3cli.checkpoint.locate import TRACKER, iteration_folder
from glm3cli.checkpoint.names import Layout, Slot, Stage, slots
from glm3cli.checkpoint.scratch import Scratch

# Megatron takes a checkpoint of iteration 0 for an unfinished one; ModelLink's converter writes 1.
_ITERATION = 1


class RanksWriter(Writer):
    """Fills the files of all ranks, whose other contents it writes first."""

    def __init__(self, layout: Layout, folder: Path, plan: WritePlan, final: Final) -> None:
        """Writes the tracker file and one file per tensor- and pipeline-parallel rank.

        Args:
            layout: legacy or mcore.
            folder: A folder without weights.
            plan: The model, the parallel sizes, and the type of every tensor.
            final: Called with a file and the byte before which nothing is going to change.

        Raises:
            OSError, RuntimeError: The disk is full or failing.
        """
        self._plan, self._scratch = plan, Scratch()
        self._archives: dict[tuple[int, int], Archive] = {}
        self._numbers: dict[Slot, tuple[int, int]] = {}
        (folder / TRACKER).write_text(str(_ITERATION), encoding="ascii")
        for p in range(plan.parallel.pp):
            content, order = _stage(layout, plan, p)
            self._numbers |= {slot: (p, number) for number, slot in enumerate(order)}
            for t in range(plan.parallel.tp):
                path = _path(folder, plan, t, p)
                path.parent.mkdir(parents=True)
                self._archives[t, p] = Archive(path, content, final)
        stages: list[list[Slot]] = [[] for _ in range(plan.parallel.pp)]
        for slot in slots(plan.model):
            stages[self._numbers[slot][0]].append(slot)
        self.order = alternating(stages, plan)

    def fill(self, slot: Slot, tensor: Tensor) -> None:
        """Writes one weight's pieces to their places."""
        p, number = self._numbers[slot]
        parallel, cut = self._plan.parallel, slot[0].cut
        pieces = pieces_of(tensor, cut, parallel.tp, self._plan.model, self._scratch.cat)
        for t, piece in enumerate(pieces):
            self._archives[t, p].fill(number, self._scratch.contiguous(piece))

    def finish(self) -> None:
        """Writes the checksums of the files."""
        for archive in self._archives.values():
            archive.finish()


def _path(folder: Path, plan: WritePlan, t: int, p: int) -> Path:
    """Returns the file of a tensor- and pipeline-parallel rank."""
    name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if plan.parallel.pp > 1 else "")
    return folder / iteration_folder(_ITERATION) / name / FILE


def _stage(layout: Layout, plan: WritePlan, p: int) -> tuple[dict[str, Any], list[Slot]]:
    """Returns the content of the files of a pipeline stage, without values.

    Args:
        layout: legacy or mcore.
        plan: The model, the parallel sizes, and the type of every tensor.
        p: The pipeline stage.

    Returns:
        The content, the same for every tensor-parallel rank, and its weights in the order in which
        the content holds them.
    """
    parallel = plan.parallel
    content: dict[str, Any] = {
        "args": arguments_of(plan.model, parallel, plan.main_dtype, is_mcore=layout == "mcore"),
        "checkpoint_version": 3.0,
        "iteration": _ITERATION,
    }
    order: list[Slot] = []
    for v in range(parallel.vpp):
        name = f"model{v}" if parallel.vpp > 1 else "model"
        content[name] = _chunk(layout, plan, p, v, order)
    content["num_floating_point_operations_so_far"] = 0
    return content, order


def _chunk(layout: Layout, plan: WritePlan, p: int, v: int, order: list[Slot]) -> dict[str, Any]:
    """Returns the (nested) dictionary of one chunk, whose tensors have no values yet.

    Args:
        layout: legacy or mcore.
        plan: The model, the parallel sizes, and the type of every tensor.
        p: The pipeline stage.
        v: The number of the chunk on the stage.
        order: The list to which the chunk's weights are appended in its order.
    """
    chunk: dict[str, Any] = {}
    parallel = plan.parallel
    layers = parallel.layers_of(plan.model.num_layers, p, v)
    is_first, is_last = p == v == 0, (p, v) == (parallel.pp - 1, parallel.vpp - 1)
    for weight, local in slots(plan.model, len(layers)):
        if (weight.stage is Stage.FIRST and not is_first) or (
            weight.stage is Stage.LAST and not is_last
        ):
            continue
        slot = (weight, None if local is None else layers[local])
        order.append(slot)
        shape = piece_shape(weight.shape(plan.model), weight.cut, parallel.tp)
        # Never touched, so never in real memory.
        empty = torch.empty(shape, dtype=plan.dtypes[slot])
        _put(chunk, weight.name(layout, local), empty)
        if weight.has_extra_state(plan.model):
            _put(chunk, weight.extra_state_name(layout, local), None)
    return chunk


def _put(tree: dict[str, Any], name: str, value: object) -> None:
    """Puts a value into nested dictionaries, at the path `name` with `/` between the levels."""
    *levels, leaf = name.split("/")
    for level in levels:
        tree = tree.setdefault(level, OrderedDict())
    tree[leaf] = value
