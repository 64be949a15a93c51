"""Context parallelism: ranks share a sequence, and for attention alone share the heads instead.

Every rank holds a run of positions, in order. Before attention an all-to-all gives each rank all
positions of some heads, and after it its own positions of all heads again (DeepSpeed-Ulysses,
Jacobs et al. 2023). The rest of a layer looks at one position at a time and needs no exchange.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def to_heads(tensor: Tensor, group: Any) -> Tensor:
    """[s / cp, b, heads, d] of this rank's positions -> [s, b, heads / cp, d] of its heads.

    Groups of keys and values that are fewer than the ranks are sent to several of them.
    """
    size = group.size()
    if tensor.size(2) < size:
        tensor = tensor.repeat_interleave(size // tensor.size(2), dim=2)
    parts = tensor.view(*tensor.shape[:2], size, -1, tensor.size(3)).movedim(
        2, 0
    )  # [cp, s / cp, b, heads / cp, d]
    return _exchange(parts, group).flatten(0, 1)


def to_positions(tensor: Tensor, group: Any) -> Tensor:
    """[s, b, heads / cp, d] of this rank's heads -> [s / cp, b, heads, d] of its positions."""
    parts = tensor.view(group.size(), -1, *tensor.shape[1:])
    return _exchange(parts, group).movedim(0, 2).flatten(2, 3)


def _exchange(parts: Tensor, group: Any) -> Tensor:
    """Sends parts[i] to rank i of the group; gives what each rank i has sent here, in order."""
    return _AllToAll.apply(parts, group)  # type: ignore[no-untyped-call]


class _AllToAll(torch.autograd.Function):
    """Its gradient is sent back the same way."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _sent(parts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _sent(grads[0], ctx.group), None


def _sent(parts: Tensor, group: Any) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received
