"""Cuts whole weights into tensor-parallel pieces and joins them again; pure functions.

A canonical tensor is the whole weight in the order of the Hugging Face checkpoints: the QKV
projection's rows are [Q | K | V], the MLP's up projection's rows are [gate; up]. Megatron's order
is the same but for the QKV rows, which stand together by query group: the group's queries, its
key, its value (megatron/core/transformer/attention.py 0.16.1, get_query_key_value_tensors).

With more tensor-parallel ranks than query groups, megatron-core gathers the QKV activations and
slices them again, so its pieces stay plain row ranges (same function, steps 1 to 4).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from glm3cli.checkpoint.names import Cut
from glm3cli.checkpoint.scratch import Cat
from glm3cli.config.model import ModelConfig


def to_megatron(tensor: Tensor, how: Cut, model: ModelConfig) -> Tensor:
    """The canonical tensor with its rows in Megatron's order."""
    if how is not Cut.QKV:
        return tensor
    groups, rest = model.num_query_groups, tensor.shape[1:]
    sizes = [model.query_size, model.kv_size, model.kv_size]
    parts = [part.reshape(groups, -1, *rest) for part in torch.split(tensor, sizes)]
    return torch.cat(parts, dim=1).reshape(tensor.shape)


def from_megatron(tensor: Tensor, how: Cut, model: ModelConfig) -> Tensor:
    """The inverse of `to_megatron`."""
    if how is not Cut.QKV:
        return tensor
    groups, rest = model.num_query_groups, tensor.shape[1:]
    heads = model.num_attention_heads // groups
    grouped = tensor.reshape(groups, (heads + 2) * model.kv_channels, *rest)
    parts = torch.split(grouped, [n * model.kv_channels for n in (heads, 1, 1)], dim=1)
    return torch.cat([part.reshape(-1, *rest) for part in parts])


def cut(tensor: Tensor, how: Cut, tp: int, model: ModelConfig) -> list[Tensor]:
    """The `tp` pieces of a canonical tensor; some may be views of it."""
    return list(pieces_of(tensor, how, tp, model))


def pieces_of(
    tensor: Tensor, how: Cut, tp: int, model: ModelConfig, cat: Cat = torch.cat
) -> Iterator[Tensor]:
    """The pieces one after the other; `cat` may use the memory of one for the next."""
    if how is Cut.WHOLE or (tp == 1 and how is Cut.GATED):
        yield from [tensor] * tp
    elif how is Cut.GATED:
        gate, up = (half.chunk(tp) for half in tensor.chunk(2))
        for pair in zip(gate, up, strict=True):
            yield cat(list(pair), 0)
    else:
        dim = 1 if how is Cut.COLS else 0
        yield from to_megatron(tensor, how, model).chunk(tp, dim=dim)


def join(pieces: list[Tensor], how: Cut, model: ModelConfig, cat: Cat = torch.cat) -> Tensor:
    """The canonical tensor of its pieces (of the first one where every rank has a copy)."""
    if how is Cut.WHOLE or len(pieces) == 1:
        return from_megatron(pieces[0], how, model)
    if how is Cut.GATED:
        gate, up = zip(*(piece.chunk(2) for piece in pieces), strict=True)
        return cat([*gate, *up], 0)
    return from_megatron(cat(pieces, 1 if how is Cut.COLS else 0), how, model)


def piece_shape(shape: tuple[int, ...], how: Cut, tp: int) -> tuple[int, ...]:
    """The shape of one piece of a weight of this (whole) shape."""
    if how is Cut.WHOLE:
        return shape
    dim = 1 if how is Cut.COLS else 0
    return tuple(size // tp if i == dim else size for i, size in enumerate(shape))
