"""Rotary positions: ChatGLM3 rotates interleaved pairs of the first half of each head.

Megatron-core is told that there are none; core attention rotates queries and keys itself, where
the positions are known whatever the parallel layout, and where recomputing it saves keeping them.
"""

import functools

import torch
from torch import Tensor

from glm3cli.device import require_active
from glm3cli.device.kernels import Rotation


@functools.lru_cache(maxsize=8)
def rotation_of_sequence(
    length: int, width: int, base: float, dtype: torch.dtype, device: torch.device
) -> Rotation:
    """What the kernel of the chip rotates the positions 0 to `length` - 1 with."""
    positions = torch.arange(length, device=device).unsqueeze(0)
    return rotation_at(positions, width, base, dtype)


def rotation_at(positions: Tensor, width: int, base: float, dtype: torch.dtype) -> Rotation:
    """What the kernel of the chip rotates tokens at `positions`, [b or 1, s], with.

    Args:
        positions: Place of every token in its row.
        width: Size of a head (kv_channels), of which half is rotated.
        base: The lowest frequency is 1 / base (rope_theta).
        dtype: That of the heads; the angles are computed in fp32 (modeling_chatglm.py).
    """
    exponents = torch.arange(0, width // 2, 2, device=positions.device).float() / (width // 2)
    angles = positions.T.unsqueeze(-1).float() * base**-exponents  # [s, b, width / 4]
    return require_active().kernels.rotation(angles.unsqueeze(2), dtype)
