"""Context parallelism (DeepSpeed-Ulysses, Jacobs et al. 2023): ranks share a sequence.

Every rank holds a run of successive positions. Before attention an all-to-all gives each rank all
positions of some heads; after attention another one gives it its own positions of all heads again.
The rest of a layer works on one position at a time and needs no exchange.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def to_heads(tensor: Tensor, group: Any) -> Tensor:
    """Exchanges this rank's positions of all heads for all positions of its share of the heads.

    Key and value groups that are fewer than the ranks are sent to several ranks.

    Args:
        tensor: Queries, keys or values at this rank's positions, [s / cp, b, heads, d].
        group: The context parallel process group.

    Returns:
        All positions of this rank's heads, [s, b, heads / cp, d].
    """
    size = group.size()
    if tensor.size(2) < size:
        tensor = tensor.repeat_interleave(size // tensor.size(2), dim=2)
    parts = tensor.view(*tensor.shape[:2], size, -1, tensor.size(3)).movedim(
        2, 0
    )  # [cp, s / cp, b, heads / cp, d]
    return _exchange(parts, group).flatten(0, 1)


def to_positions(tensor: Tensor, group: Any) -> Tensor:
    """Exchanges all positions of this rank's heads for its own positions of all heads.

    Args:
        tensor: The context of this rank's heads, [s, b, heads / cp, d].
        group: The context parallel process group.

    Returns:
        The context at this rank's positions, [s / cp, b, heads, d].
    """
    parts = tensor.view(group.size(), -1, *tensor.shape[1:])
    return _exchange(parts, group).movedim(0, 2).flatten(2, 3)


def _exchange(parts: Tensor, group: Any) -> Tensor:
    """Sends parts[i] to rank i of the group; returns what each rank has sent here, in order."""
    return _AllToAll.apply(parts, group)  # type: ignore[no-untyped-call]


class _AllToAll(torch.autograd.Function):
    """An all-to-all whose gradient is an all-to-all, too."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _sent(parts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _sent(grads[0], ctx.group), None


def _sent(parts: Tensor, group: Any) -> Tensor:
    """Calls all-to-all on the first dimension of `parts`."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received
