"""Causal attention in blocks of queries, as whole matrix products over heads."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Queries of a sequence that attend at once. They are fewer, but not under the second number, where
# they would have more scores than the third one over all heads: so many stay in a large cache.
_MOST_QUERIES, _LEAST_QUERIES, _MOST_SCORES = 64, 16, 2**22


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, segment_ids: Tensor | None
) -> Tensor:
    """Returns the context of causal attention in whole products, as `Kernels.attention` has it."""
    return _Attention.apply(query, key, value, scale, segment_ids)  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    """Causal attention in blocks of queries, which are multiplied by no key behind them.

    It saves its arguments alone. The backward pass computes a block's probabilities again, so that
    memory grows with the sequence's length as that of its arguments does. In a product the queries
    of all heads that share keys stand below one another.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        segment_ids: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.segment_ids = scale, segment_ids
        groups, context = key.size(2), query.new_empty(query.shape)
        for rows, ids in _rows(query, segment_ids):
            keys, values = (_stacked(one[:, rows], groups) for one in (key, value))
            room = _Room(query[:, rows])
            for asking, seen, mask in _blocks(room.size, query, ids):
                queries = _stacked(query[asking, rows], groups)
                weights = room.weights(queries, keys[:, seen], scale, mask)
                _unstack(torch.bmm(weights, values[:, seen]), context[asking, rows], groups)
        return context

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        [grad], (query, key, value) = grads, ctx.saved_tensors
        scale, groups = ctx.scale, key.size(2)
        of_query, of_key, of_value = (one.new_empty(one.shape) for one in (query, key, value))
        for rows, ids in _rows(query, ctx.segment_ids):
            keys, values = (_stacked(one[:, rows], groups) for one in (key, value))
            # Lying down, [groups, d, s]: a product whose left factor is small is the faster one.
            of_keys, of_values = (torch.zeros_like(one.mT).contiguous() for one in (keys, values))
            room = _Room(query[:, rows])
            for asking, seen, mask in _blocks(room.size, query, ids):
                queries = _stacked(query[asking, rows], groups)
                above = _stacked(grad[asking, rows], groups)
                weights = room.weights(queries, keys[:, seen], scale, mask)
                of_values[..., seen].baddbmm_(above.mT, weights)
                scores = room.gradient(above, values[:, seen], weights)
                of_keys[..., seen].baddbmm_(queries.mT, scores, alpha=scale)
                product = torch.baddbmm(queries, scores, keys[:, seen], beta=0, alpha=scale)
                _unstack(product, of_query[asking, rows], groups)
            _unstack(of_keys.mT, of_key[:, rows], groups)
            _unstack(of_values.mT, of_value[:, rows], groups)
        return of_query, of_key, of_value, None, None


class _Room:
    """Memory for the scores of a block, which all blocks of some rows share.

    Attributes:
        size: The number of queries in a block.
    """

    def __init__(self, query: Tensor) -> None:
        """Takes the memory for blocks of some queries, [s, b, heads, d]."""
        length, batch, heads = query.shape[:3]
        most = _MOST_SCORES // (length * batch * heads)
        self.size = min(max(_LEAST_QUERIES, min(_MOST_QUERIES, most)), length)
        self._memory = query.new_empty(2, batch * heads * self.size * length)

    def weights(self, queries: Tensor, keys: Tensor, scale: float, mask: Tensor) -> Tensor:
        """Returns the probabilities of the keys for each query, [groups, n, seen].

        Args:
            queries: The queries of the block, those of all heads of a group, [groups, n, d].
            keys: The keys that the block sees, [groups, seen, d].
            scale: Factor on the scores.
            mask: What is added to the scores of the last keys, [queries of a head, last].
        """
        scores, weights = self._like(queries, keys)
        torch.baddbmm(scores, queries, keys.mT, beta=0, alpha=scale, out=scores)
        of_heads = scores.view(scores.size(0), -1, mask.size(0), scores.size(2))
        of_heads[..., -mask.size(1) :].add_(mask)
        torch.softmax(scores, -1, out=weights)
        return weights

    def gradient(self, above: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        """Returns the gradient of the scores, [groups, n, seen].

        Args:
            above: The gradient of the context of the block, [groups, n, d].
            values: The values that the block sees, [groups, seen, d].
            weights: What `weights` has returned.
        """
        scores, _ = self._like(above, values)
        torch.bmm(above, values.mT, out=scores)
        torch.ops.aten._softmax_backward_data.out(
            scores, weights, -1, scores.dtype, grad_input=scores
        )
        return scores

    def _like(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both parts of the memory in the shape of the scores of queries and keys."""
        shape = (*queries.shape[:2], keys.size(1))
        count = shape[0] * shape[1] * shape[2]
        return self._memory[0, :count].view(shape), self._memory[1, :count].view(shape)


def _rows(query: Tensor, segment_ids: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
    """Yields the rows of a batch that are multiplied together, and their segment ids.

    All are, but packs: each has samples of its own lengths.
    """
    if segment_ids is None:
        yield slice(None), None
    else:
        for row, ids in enumerate(segment_ids):
            yield slice(row, row + 1), ids


def _blocks(size: int, query: Tensor, ids: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields the queries of each block, the keys that they see, and a mask.

    The mask is added to the scores of the last of these keys: 0 where a query sees a key, and minus
    infinity elsewhere.

    Args:
        size: The number of queries in a block.
        query: The queries, [s, b, heads, d].
        ids: The segment ids of their row, [s]; None if all positions are of one sample.
    """
    length = query.size(0)
    later = query.new_full((size, size), -torch.inf).triu_(diagonal=1)
    for start in range(0, length, size):
        end = min(start + size, length)
        asking, first, mask = slice(start, end), 0, later[: end - start, : end - start]
        if ids is not None:
            own = ids[asking]
            first = int(torch.isin(ids[:end], own).nonzero()[0])
            others = own.unsqueeze(1) != ids[first:end]
            if others.any():
                whole = query.new_zeros(others.shape).masked_fill_(others, -torch.inf)
                whole[:, start - first :].add_(mask)
                mask = whole
        yield asking, slice(first, end), mask


def _stacked(heads: Tensor, groups: int) -> Tensor:
    """Returns [n, b, heads, d] as [b * groups, heads / groups * n, d], contiguous."""
    return _by_group(heads, groups).reshape(heads.size(1) * groups, -1, heads.size(3)).contiguous()


def _unstack(stacked: Tensor, heads: Tensor, groups: int) -> None:
    """Writes what `_stacked` would return into the tensor that it would take."""
    parts = _by_group(heads, groups)
    parts.copy_(stacked.view(parts.shape))


def _by_group(heads: Tensor, groups: int) -> Tensor:
    """Returns a view of [n, b, heads, d] as [b, groups, heads / groups, n, d]."""
    return heads.view(*heads.shape[:2], groups, -1, heads.size(3)).permute(1, 2, 3, 0, 4)
