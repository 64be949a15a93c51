"""Rotary positions (RoPE): ChatGLM3 rotates interleaved pairs of the first half of each head.

Megatron-core's own position embedding is switched off. Core attention rotates queries and keys
itself: there all positions of a head are present at any parallel sizes, and recomputing attention
recomputes the rotated queries and keys, too.
"""

import functools

import torch
from torch import Tensor

from glm3cli.device import require_active
from glm3cli.device.kernels import Rotation


@functools.lru_cache(maxsize=8)
def rotation_of_sequence(
    length: int,
    width: int,
    base: float,
    dtype: torch.dtype,
    device: torch.device,
    factor: float = 1.0,
) -> Rotation:
    """Returns the rotation of the positions 0 to `length` - 1; cached, as all layers share it.

    Args:
        length: Number of positions.
        width: Size of a head (kv_channels), of which half is rotated.
        base: Base of the frequencies (rope_theta).
        dtype: Type of the heads that will be rotated.
        device: The device of the result.
        factor: Divisor of the positions.
    """
    angles = angles_at(torch.arange(length, device=device), width, base, factor)
    return require_active().kernels.rotation(angles[:, None, None], dtype)


def angles_at(positions: Tensor, width: int, base: float, factor: float = 1.0) -> Tensor:
    """Returns the angles of tokens at given positions.

    They are computed in fp32, as in the original code (modeling_chatglm.py).

    Args:
        positions: The position of every token in its row, [n].
        width: Size of a head (kv_channels), of which half is rotated.
        base: Base of the frequencies (rope_theta): pair i of the width / 4 pairs turns by position
            x base^(-4 i / width).
        factor: Divisor of the positions: transformers' linear RoPE scaling.

    Returns:
        The angles, [n, width / 4], fp32.
    """
    frequencies = _frequencies(width, base, positions.device) / factor
    return torch.outer(positions.float(), frequencies)


@functools.lru_cache(maxsize=8)
def _frequencies(width: int, base: float, device: torch.device) -> Tensor:
    """Returns the angle by which each pair turns from one position to the next, [width / 4]."""
    exponents = torch.arange(0, width // 2, 2, device=device).float() / (width // 2)
    return base**-exponents
