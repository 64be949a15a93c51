"""Copies an adapter's matrices into the model on the ranks, and gathers them from there."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glm3cli.checkpoint.adapter.pairs import Adapter, Pair
from glm3cli.checkpoint.cuts import cut, join
from glm3cli.checkpoint.names import WEIGHTS, Cut, Slot, Weight
from glm3cli.config.model import ModelConfig
from glm3cli.config.options.lora import TARGETS
from glm3cli.model.adapters import AdapterShape, AdapterShapes, adapters_of, keep_lengths
from glm3cli.parallel.groups import Grid

_WEIGHTS = {weight.logical: weight for weight in WEIGHTS}
_TARGETS = {logical: target for target, logical in TARGETS.items()}
# The pieces of one tensor parallel rank, by the names of the matrices.
_Pieces = dict[str, Tensor]


def shapes_of(adapter: Adapter, model: ModelConfig) -> AdapterShapes:
    """Returns the shapes of an adapter's modules, from which a model is built.

    Args:
        adapter: The adapter.
        model: The shape of the base model.
    """
    return {
        (_TARGETS[weight.logical], layer or 0): AdapterShape(
            pair.a.size(0), pair.scale, pair.magnitude is not None, pair.start is not None
        )
        for (weight, layer), pair in adapter.whole(model).items()
    }


def load_adapter(
    chunks: Sequence[torch.nn.Module], adapter: Adapter, model: ModelConfig, grid: Grid
) -> None:
    """Fills the adapters of this rank's model, whose weights are loaded, casting to their type.

    Args:
        chunks: The model chunks of this rank, built with the shapes of this adapter.
        adapter: The whole matrices.
        model: The shape of the base model.
        grid: This rank's place among the parallel groups.
    """
    pairs = adapter.whole(model)
    with torch.no_grad():
        for slot, parts in _parts_here(chunks).items():
            whole = _matrices(pairs[slot])
            for name, part in parts.items():
                how = _cut(slot[0], name)
                part.copy_(cut(whole[name], how, grid.tp_size, model)[grid.tp_rank])
        for chunk in chunks:
            keep_lengths(chunk)


def gather_adapter(
    chunks: Sequence[torch.nn.Module], model: ModelConfig, grid: Grid
) -> Adapter | None:
    """Joins the adapters of all ranks; every rank must call it.

    Args:
        chunks: The model chunks of this rank.
        model: The shape of the base model.
        grid: This rank's place among the parallel groups.

    Returns:
        The adapter on rank 0, in the type of the weights; None on all others.
    """
    if grid.dp_rank or grid.cp_rank:
        return None  # has copies
    scales = {
        _slot(*key): adapter.scale
        for chunk in chunks
        for key, adapter in adapters_of(chunk).items()
    }
    pieces = {
        slot: {name: part.detach().cpu() for name, part in parts.items()}
        for slot, parts in _parts_here(chunks).items()
    }
    ranks: list[Any] | None = [None] * grid.tp_size if grid.tp_rank == 0 else None
    # By ranks among all: some devices have a gather_object of their own, without group_dst.
    dist.gather_object(pieces, ranks, dist.get_global_rank(grid.tp_group, 0), grid.tp_group)
    if ranks is None:
        return None
    ours = {slot: _joined(slot, ranks, scales[slot], model) for slot in pieces}
    stages: list[Any] | None = [None] * grid.pp_size if grid.pp_rank == 0 else None
    dist.gather_object(ours, stages, dist.get_global_rank(grid.pp_group, 0), grid.pp_group)
    if stages is None:
        return None
    pairs = {slot: [pair] for stage in stages for slot, pair in stage.items()}
    order = sorted(pairs, key=lambda slot: (slot[1] or 0, WEIGHTS.index(slot[0])))
    return Adapter({slot: pairs[slot] for slot in order})


def _parts_here(chunks: Sequence[torch.nn.Module]) -> dict[Slot, _Pieces]:
    """Returns the matrices of this rank's adapters, or its pieces of them, by weight and name."""
    return {
        _slot(*key): dict(adapter.state_dict(keep_vars=True))
        for chunk in chunks
        for key, adapter in adapters_of(chunk).items()
    }


def _matrices(pair: Pair) -> _Pieces:
    """Returns the tensors of a pair by the names that they have in the model's adapters."""
    start_a, start_b = pair.start or (None, None)
    found = {"a": pair.a, "b": pair.b, "magnitude": pair.magnitude}
    found |= {"start_a": start_a, "start_b": start_b}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _slot(target: str, layer: int) -> Slot:
    """Returns the weight that a target stands for, and its layer."""
    return _WEIGHTS[TARGETS[target]], layer


def _cut(weight: Weight, name: str) -> Cut:
    """Returns how a tensor of a weight's adapter is cut: A as the columns, others as the rows."""
    of_columns = weight.cut is Cut.COLS
    return weight.cut if of_columns == (name in ("a", "start_a")) else Cut.WHOLE


def _joined(
    slot: Slot, ranks: Sequence[dict[Slot, _Pieces]], scale: float, model: ModelConfig
) -> Pair:
    """Returns the whole matrices of one weight's adapter.

    Args:
        slot: The weight and its layer.
        ranks: The pieces of each tensor parallel rank.
        scale: The factor by which the product is multiplied.
        model: The shape of the base model.
    """
    whole = {
        name: join([pieces[slot][name] for pieces in ranks], _cut(slot[0], name), model)
        for name in ranks[0][slot]
    }
    a, b, magnitude = whole["a"], whole["b"], whole.get("magnitude")
    start = (whole["start_a"], whole["start_b"]) if "start_a" in whole else None
    return Pair(slice(0, b.size(0)), a, b, scale, magnitude, start)
