"""Cuts whole weights into the pieces of tensor-parallel ranks, and joins the pieces again.

The whole weight in the row order of the chatglm layout is called the canonical tensor: the rows of
the QKV projection are [Q | K | V], those of the MLP's up projection [gate; up]. Megatron has the
same order except for the QKV rows, which it groups by query group: the queries of the group, its
key, its value (megatron/core/transformer/attention.py 0.16.1, get_query_key_value_tensors).

With more tensor-parallel ranks than query groups, megatron-core gathers the QKV activations and
slices them again, so its pieces are plain ranges of rows there, too (same function, steps 1 to 4).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from glm3cli.checkpoint.names import Cut
from glm3cli.checkpoint.scratch import Cat
from glm3cli.config.model import ModelConfig


def to_megatron(tensor: Tensor, how: Cut, model: ModelConfig) -> Tensor:
    """Returns a canonical tensor with its rows in Megatron's order.

    Args:
        tensor: The canonical tensor of one weight, [rows, ...].
        how: How the weight is cut; only `Cut.QKV` has another order in Megatron.
        model: The model's shape.
    """
    if how is not Cut.QKV:
        return tensor
    groups, rest = model.num_query_groups, tensor.shape[1:]
    sizes = [model.query_size, model.kv_size, model.kv_size]
    parts = [part.reshape(groups, -1, *rest) for part in torch.split(tensor, sizes)]
    return torch.cat(parts, dim=1).reshape(tensor.shape)


def from_megatron(tensor: Tensor, how: Cut, model: ModelConfig) -> Tensor:
    """Returns the canonical tensor of one in Megatron's row order; the inverse of `to_megatron`."""
    if how is not Cut.QKV:
        return tensor
    groups, rest = model.num_query_groups, tensor.shape[1:]
    heads = model.num_attention_heads // groups
    grouped = tensor.reshape(groups, (heads + 2) * model.kv_channels, *rest)
    parts = torch.split(grouped, [n * model.kv_channels for n in (heads, 1, 1)], dim=1)
    return torch.cat([part.reshape(-1, *rest) for part in parts])


def cut(tensor: Tensor, how: Cut, tp: int, model: ModelConfig) -> list[Tensor]:
    """Returns the `tp` pieces of a canonical tensor, by tensor-parallel rank.

    Some may be views of the tensor.
    """
    return list(pieces_of(tensor, how, tp, model))


def pieces_of(
    tensor: Tensor, how: Cut, tp: int, model: ModelConfig, cat: Cat = torch.cat
) -> Iterator[Tensor]:
    """Yields the `tp` pieces of a canonical tensor, by tensor-parallel rank.

    Args:
        tensor: The canonical tensor.
        how: How the weight is cut.
        tp: The number of tensor-parallel ranks.
        model: The model's shape.
        cat: Joins the parts of a piece. It may use the memory of one piece again for the next.
    """
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
    """Returns the canonical tensor of the pieces of all tensor-parallel ranks.

    Where every rank has a copy of the weight, the first one is taken.

    Args:
        pieces: The pieces, by tensor-parallel rank.
        how: How the weight is cut.
        model: The model's shape.
        cat: Joins the pieces.
    """
    if how is Cut.WHOLE or len(pieces) == 1:
        return from_megatron(pieces[0], how, model)
    if how is Cut.GATED:
        gate, up = zip(*(piece.chunk(2) for piece in pieces), strict=True)
        return cat([*gate, *up], 0)
    return from_megatron(cat(pieces, 1 if how is Cut.COLS else 0), how, model)


def piece_shape(shape: tuple[int, ...], how: Cut, tp: int) -> tuple[int, ...]:
    """Returns the shape of one tensor-parallel rank's piece of a whole weight of shape `shape`."""
    if how is Cut.WHOLE:
        return shape
    dim = 1 if how is Cut.COLS else 0
    return tuple(size // tp if i == dim else size for i, size in enumerate(shape))
