"""Cuts whole weights into the pieces of tensor-parallel ranks, and joins the pieces again.

The whole weight in the row order of the chatglm layout is called the canonical tensor: the rows of
the QKV projection are [Q | K | V], those of the MLP's up projection [gate; up]. Megatron has the
same order except for the QKV rows, which it groups by query group: the queries of the group, its
key, its value (megatron/core/transformer/attention.py 0.16.1, get_query_key_value_tensors).

With more tensor-parallel ranks than query groups, megatron-core gathers the QKV activations and
slices them again, so its pieces are plain ranges of rows there, too (same function, steps 1 to 4).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from glm3cli.checkpoint.names import Cut
from glm3cli.checkpoint.scratch import Cat
from glm3cli.config.model import ModelConfig


def to_megatron(tensor: Tensor, how: Cut, model: ModelConfig, cat: Cat = torch.cat) -> Tensor:
    """Returns a canonical tensor with its rows in Megatron's order.

    Args:
        tensor: The canonical tensor of one weight, [rows, ...].
        how: How the weight is cut; only `Cut.QKV` has another order in Megatron.
        model: The model's shape.
        cat: Joins the rows in their new order.
    """
    if how is not Cut.QKV:
        return tensor
    parts = torch.split(tensor, [model.query_size, model.kv_size, model.kv_size])
    by_group = zip(*(part.chunk(model.num_query_groups) for part in parts), strict=True)
    return cat([rows for group in by_group for rows in group], 0)


def from_megatron(tensor: Tensor, how: Cut, model: ModelConfig, cat: Cat = torch.cat) -> Tensor:
    """Returns the canonical tensor of one in Megatron's row order; the inverse of `to_megatron`."""
    return _canonical([tensor], how, model, cat)


def _canonical(pieces: Sequence[Tensor], how: Cut, model: ModelConfig, cat: Cat) -> Tensor:
    """Returns the canonical tensor of consecutive rows in Megatron's order.

    Args:
        pieces: The rows; if there are several pieces, they are copied once.
        how: How the weight is cut; for `Cut.QKV` the order is changed.
        model: The model's shape.
        cat: Joins the rows in their new order.
    """
    if how is not Cut.QKV:
        return pieces[0] if len(pieces) == 1 else cat(list(pieces), 0)
    heads, width = model.num_attention_heads // model.num_query_groups, model.kv_channels
    parts = [(0, heads), (heads, heads + 1), (heads + 1, heads + 2)]
    starts = range(0, model.num_query_groups * (heads + 2), heads + 2)
    runs = [((s + first) * width, (s + end) * width) for first, end in parts for s in starts]
    return cat([rows for run in runs for rows in _rows(pieces, *run)], 0)


def _rows(pieces: Sequence[Tensor], start: int, end: int) -> Iterator[Tensor]:
    """Yields the rows from `start` to `end` of pieces that follow each other, as views."""
    for piece in pieces:
        size = len(piece)
        if start < size and end > 0:
            yield piece[max(start, 0) : end]
        start, end = start - size, end - size


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
        yield from to_megatron(tensor, how, model, cat).chunk(tp, dim=dim)


def join(pieces: list[Tensor], how: Cut, model: ModelConfig, cat: Cat = torch.cat) -> Tensor:
    """Returns the canonical tensor of the pieces of all tensor-parallel ranks.

    Where every rank has a copy of the weight, the first one is taken.

    Args:
        pieces: The pieces, by tensor-parallel rank.
        how: How the weight is cut.
        model: The model's shape.
        cat: Joins the pieces.
    """
    if how is Cut.WHOLE:
        return pieces[0]
    if how is Cut.GATED and len(pieces) > 1:
        gate, up = zip(*(piece.chunk(2) for piece in pieces), strict=True)
        return cat([*gate, *up], 0)
    if how is Cut.COLS and len(pieces) > 1:
        return cat(pieces, 1)
    return _canonical(pieces, how, model, cat)


def piece_shape(shape: tuple[int, ...], how: Cut, tp: int) -> tuple[int, ...]:
    """Returns the shape of one tensor-parallel rank's piece of a whole weight of shape `shape`."""
    if how is Cut.WHOLE:
        return shape
    dim = 1 if how is Cut.COLS else 0
    return tuple(size // tp if i == dim else size for i, size in enumerate(shape))
