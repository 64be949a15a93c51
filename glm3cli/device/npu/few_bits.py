"""Weights of 8 and 4 bits as npu_weight_quant_batchmatmul takes them, on the A2 and the A3.

The operator makes (numbers + offset) * scale of a weight while it reads it. 8 bits lie as [out, in]
and are handed over transposed, as its documents advise for one scale per output; 4 bits lie as
[in, out], eight of them in one whole number of 32 bits, with scales and offsets of
[groups, out]. Its limits, beside types: 65,535 inputs and outputs in a call, and groups of a
multiple of 32 that is smaller than the number of inputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm3cli.device.dtypes import Quantized

npu = torch.ops.npu

TYPES = (torch.float16, torch.bfloat16)
_MOST = 65_535  # inputs, and outputs of one call
_IN_ONE = 8  # numbers of 4 bits in one of 32


@dataclass(frozen=True)
class Part:
    """Some outputs of a weight.

    Attributes:
        weight: The numbers, [in, out] as a view of [out, in], or [in, out / 8] of 4 bits.
        scales: The scales in the type of the inputs, [1 or groups, out].
        offsets: With 4 bits, what is added to the numbers, [1 or groups, out]; else None.
        group: The number of inputs that share a scale; 0 if all do.
    """

    weight: Tensor
    scales: Tensor
    offsets: Tensor | None
    group: int


def is_taken(weight: Quantized, dtype: torch.dtype) -> bool:
    """Returns whether the operator multiplies inputs of a type by a weight."""
    outputs, inputs = weight.numbers.shape
    fits = weight.zeros is None or outputs % _IN_ONE == 0
    return dtype in TYPES and inputs <= _MOST and fits


def pack(weight: Quantized, dtype: torch.dtype) -> list[Part]:
    """Returns a weight as the operator takes it, in as many parts as it needs calls.

    Args:
        weight: A weight that is taken (see `is_taken`).
        dtype: The type of the inputs.
    """
    count = -(-len(weight.numbers) // _MOST)
    # Parts begin at whole numbers of 32 bits.
    size = -(-len(weight.numbers) // (count * _IN_ONE)) * _IN_ONE
    starts = range(0, len(weight.numbers), size)
    return [_part(weight, slice(start, start + size), dtype) for start in starts]


def _part(weight: Quantized, own: slice, dtype: torch.dtype) -> Part:
    """Packs some of the outputs."""
    numbers = weight.numbers[own]
    if weight.zeros is None:
        return Part(numbers.t(), weight.scales[own].to(dtype).unsqueeze(0), None, 0)
    scales, zeros = weight.scales[own], weight.zeros[own]
    # What the number 8 stands for, in steps: (numbers - 8 + offset) * scale is the weight.
    offsets = (zeros / scales).to(dtype).t().contiguous()
    signed = (numbers.t() - 8).int().contiguous()
    groups = scales.size(1)
    return Part(
        npu.npu_convert_weight_to_int4pack(signed),
        scales.to(dtype).t().contiguous(),
        offsets,
        numbers.size(1) // groups if groups > 1 else 0,
    )


def multiply(hidden: Tensor, parts: list[Part], bias: Tensor | None) -> Tensor:
    """Multiplies by all parts, [n, in] -> [n, out].

    Args:
        hidden: The inputs, [n, in].
        parts: The result of `pack` for the type of the inputs.
        bias: The numbers that are added, [out], in the type of the inputs.
    """
    if bias is not None and hidden.dtype == torch.bfloat16:
        bias = bias.float()  # the operator's rule
    products, first = [], 0
    for part in parts:
        outputs = part.scales.size(1)
        options: dict[str, Any] = {}
        if part.offsets is not None:
            options = {"antiquant_offset": part.offsets, "antiquant_group_size": part.group}
        if bias is not None:
            options["bias"] = bias[first : first + outputs]
        products.append(
            npu.npu_weight_quant_batchmatmul(hidden, part.weight, part.scales, **options)
        )
        first += outputs
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)
