"""Weights of 8 or 4 bits for inference: what is rounded, and how.

Matrix products of a decoded token take as long as their weights take to be read: a quarter of the
bytes of fp32, or an eighth, take that much less. The numbers that are multiplied stay as they are
(weight-only quantization). With 8 bits each output has a scale; with 4 bits each group of inputs of
each output has a scale and a zero point (Frantar et al. 2022, "GPTQ", whose groups these are,
without its correction).
"""

import torch
from torch import Tensor

from glm3cli.device.dtypes import Quantized

# The sizes of groups that kernels take, the best first: larger ones lose too much.
_GROUPS = (128, 64, 32)


def quantize(weight: Tensor, bits: int) -> Quantized:
    """Rounds a weight to whole numbers.

    Args:
        weight: The weight, [out, in].
        bits: 8 or 4.

    Returns:
        The numbers, with what turns them into the weight again. A weight whose number of inputs is
        no multiple of 32 has 8 bits.
    """
    group = next((size for size in _GROUPS if weight.size(1) % size == 0), None)
    if bits == 4 and group is not None:
        return _in_groups(weight.float(), group)
    scales = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    numbers = (weight.float() / scales.unsqueeze(1)).round().to(torch.int8)
    return Quantized(8, numbers, scales)


def _in_groups(weight: Tensor, group: int) -> Quantized:
    """Rounds to the numbers 0 to 15, of which the least and the largest of a group are ends."""
    parts = weight.unflatten(1, (-1, group))  # type: ignore[no-untyped-call]
    least, largest = parts.aminmax(dim=-1)
    # Kernels hold what a number stands for in 8 binary digits: finer steps would be lost on them,
    # and where all numbers of a group are the same, there would be no step.
    finest = torch.maximum(least.abs(), largest.abs()) * 2**-8
    scales = torch.maximum((largest - least) / 15, finest).clamp(min=1e-12)
    numbers = ((parts - least.unsqueeze(-1)) / scales.unsqueeze(-1)).round().clamp(0, 15)
    return Quantized(4, numbers.flatten(1).to(torch.int8), scales, least + 8 * scales)
