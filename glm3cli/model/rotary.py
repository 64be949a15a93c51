"""Rotary positions: ChatGLM3 rotates interleaved pairs of the first half of each head.

Megatron-core is told that there are none; core attention rotates queries and keys itself, where
the positions are known whatever the parallel layout, and where recomputing it saves keeping them.
"""

import functools
from typing import Any

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=8)
def rotation_of_sequence(
    length: int, width: int, base: float, dtype: torch.dtype, device: torch.device
) -> Rotation:
    """Cosines and sines of the positions 0 to `length` - 1, [s, 1, 1, width / 4] each."""
    positions = torch.arange(length, device=device).unsqueeze(0)
    return rotation_at(positions, width, base, dtype)


def rotation_at(positions: Tensor, width: int, base: float, dtype: torch.dtype) -> Rotation:
    """Cosines and sines of `positions`, [b or 1, s], as [s, b or 1, 1, width / 4] each.

    Args:
        positions: Place of every token in its row.
        width: Size of a head (kv_channels), of which half is rotated.
        base: The lowest frequency is 1 / base (rope_theta).
        dtype: That of the heads; the angles are computed in fp32 (modeling_chatglm.py).
    """
    exponents = torch.arange(0, width // 2, 2, device=positions.device).float() / (width // 2)
    angles = positions.T.unsqueeze(-1).float() * base**-exponents  # [s, b, width / 4]
    angles = angles.unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotates [s, b, heads, width] by the angles of `rotation`."""
    return _Rotate.apply(heads, *rotation)  # type: ignore[no-untyped-call]


class _Rotate(torch.autograd.Function):
    """Writes each half of the result once; the gradient is the rotation the other way."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.rotation = cosines, sines
        return _rotated(heads, cosines, sines, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.rotation
        return _rotated(grads[0], cosines, sines, -1), None, None


def _rotated(heads: Tensor, cosines: Tensor, sines: Tensor, sign: int) -> Tensor:
    half = heads.size(-1) // 2
    result = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    result[..., half:] = heads[..., half:]
    (even, odd), (new_even, new_odd) = (
        (tensor[..., 0:half:2], tensor[..., 1:half:2]) for tensor in (heads, result)
    )
    torch.mul(even, cosines, out=new_even).addcmul_(odd, sines, value=-sign)
    torch.mul(odd, cosines, out=new_odd).addcmul_(even, sines, value=sign)
    return result
