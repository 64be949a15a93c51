"""Weights of few bits."""

from typing import Any

import torch
from torch import Tensor

from tests.support.npu.operators.kernel import FLOATS, kernel, require


@kernel
def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int) -> Tensor:
    require(weight.dtype == torch.int32, "npu_convert_weight_to_int4pack: not int32")
    require(weight.is_contiguous(), "npu_convert_weight_to_int4pack: not contiguous")
    require(weight.dim() == 2, "npu_convert_weight_to_int4pack: not two dims")
    require(weight.size(1) % 8 == 0, "npu_convert_weight_to_int4pack: no multiple of 8")
    within = bool(((weight >= -8) & (weight <= 7)).all())
    require(within, "npu_convert_weight_to_int4pack: a number is not of 4 bits")
    packed = torch.zeros(weight.size(0), weight.size(1) // 8, dtype=torch.int32)
    for place in range(8):
        packed |= (weight[:, place::8] & 0xF) << 4 * place
    return packed


def _numbers(weight: Tensor) -> Tensor:
    """Returns the numbers of a weight, [k, n], from 8 or 4 bits."""
    if weight.dtype == torch.int8:
        return weight.float()
    require(weight.dtype == torch.int32, f"npu_weight_quant_batchmatmul: weight {weight.dtype}")
    rows = weight if weight.is_contiguous() else weight.t()
    parts = [(rows << 28 - 4 * place) >> 28 for place in range(8)]  # keeps the sign
    numbers = torch.stack(parts, -1).flatten(1).float()
    return numbers if weight.is_contiguous() else numbers.t()


@kernel
def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None,
    quant_scale: Tensor | None,
    quant_offset: Tensor | None,
    bias: Tensor | None,
    antiquant_group_size: int,
    inner_precise: int,
    *_others: Any,
) -> Tensor:
    name = "npu_weight_quant_batchmatmul"
    require(x.dtype in FLOATS[:2], f"{name}: no {x.dtype}")
    require(x.dim() == weight.dim() == 2, f"{name}: not two dims")
    require(min(*x.shape, *weight.shape) > 0, f"{name}: an empty tensor")
    for tensor in (x, weight, antiquant_scale):
        require(tensor.is_contiguous() or tensor.t().is_contiguous(), f"{name}: neither as it is")
    require(quant_scale is None and quant_offset is None, f"{name}: results of 8 bits")
    require(inner_precise == 0, f"{name}: only a weight in FRACTAL_NZ may be less precise")
    numbers = _numbers(weight)
    (k, n), group = numbers.shape, antiquant_group_size
    require(x.size(1) == k, f"{name}: the k of x and weight should be equal")
    require(k <= 65535 and n <= 65535, f"{name}: k or n is above 65535")
    require(antiquant_scale.dtype == x.dtype, f"{name}: scale has another type than x")
    # Of an only group, the scale is that of a channel, and the size must be 0.
    fits = group == 0 or (32 <= group <= k - 1 and group % 32 == 0)
    require(fits, f"{name}: antiquant_group_size is no multiple of 32 in [32, k - 1]")
    rows = -(-k // group) if group else 1
    require(antiquant_scale.shape == (rows, n), f"{name}: scale isn't [{rows}, {n}]")
    scale = antiquant_scale.float().repeat_interleave(group or k, 0)[:k]
    if antiquant_offset is not None:
        require(antiquant_offset.dtype == antiquant_scale.dtype, f"{name}: offset's type")
        require(antiquant_offset.shape == antiquant_scale.shape, f"{name}: offset's shape")
        numbers = numbers + antiquant_offset.float().repeat_interleave(group or k, 0)[:k]
    product = x.float() @ (numbers * scale)
    if bias is not None:
        wanted = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        require(bias.dtype == wanted, f"{name}: bias isn't {wanted} with {x.dtype}")
        require(bias.is_contiguous() and bias.shape in ((n,), (1, n)), f"{name}: bias's shape")
        product = product + bias.float()
    return product.to(x.dtype)
