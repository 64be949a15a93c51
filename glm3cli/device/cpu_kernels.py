"""What a CPU computes otherwise than plain torch does: the linear layers of inference.

A decoded token multiplies each weight by one row, or by a few. MKL, which torch calls for them in
fp32, multiplies one row on a single thread, and a few rows at half the speed of oneDNN with weights
that it has laid out for itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from glm3cli.device.dtypes import Quantized
from glm3cli.device.kernels import Kernels

_ONEDNN = torch.ops.mkldnn
# oneDNN 3.12 multiplies three to six rows by another program than one or two, which loads a weight
# from memory 1.3 to 1.6 times as fast (on Zen 4). Fewer rows get zeros beside them.
_LEAST_ROWS = 5
# Of torch's kernel for 4 bits, which takes outputs in blocks of so many.
_BLOCK = 16


class CpuKernels(Kernels):
    """Plain torch, with oneDNN's linear layers in inference, and torch's own of fewer bits."""

    def pack(self, weight: Tensor) -> Tensor:
        """Returns a weight in oneDNN's own layout, or as it is where oneDNN can't multiply it."""
        return _ONEDNN._reorder_linear_weight(weight, None) if _is_multiplied(weight) else weight

    def linear(self, hidden: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """Multiplies by oneDNN, at least five rows, if the weight is in its layout."""
        if not packed.is_mkldnn:
            return super().linear(hidden, packed, bias)
        count = hidden.size(0)
        if count < _LEAST_ROWS:
            hidden = pad(hidden, (0, 0, 0, _LEAST_ROWS - count))
        return _ONEDNN._linear_pointwise(hidden, packed, bias, "none", [], "")[:count]

    def pack_quantized(self, weight: Quantized, dtype: torch.dtype) -> Any:
        """Returns the weight as torch's own kernels take it; as it is if they can't.

        They multiply in bf16, whatever the type of the numbers.
        """
        scales, outputs = weight.scales.bfloat16(), weight.numbers.size(0)
        if weight.zeros is None:
            return weight.numbers, scales
        if outputs % _BLOCK:
            return weight
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.numbers.int(), 1)
        pairs = torch.stack([scales, weight.zeros.bfloat16()], dim=-1).transpose(0, 1).contiguous()
        return packed, weight.numbers.size(1) // scales.size(1), pairs

    def linear_quantized(self, hidden: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        """Multiplies numbers in bf16, for which alone the kernels are fast, and sums in fp32."""
        if isinstance(packed, Quantized):
            return super().linear_quantized(hidden, packed, bias)
        if len(packed) == 2:
            product = torch._weight_int8pack_mm(hidden.bfloat16(), *packed)
        else:
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(hidden.bfloat16(), *packed)
        product = product.to(hidden.dtype)
        return product if bias is None else product.add_(bias)


def _is_multiplied(weight: Tensor) -> bool:
    """Returns whether oneDNN multiplies by this weight on this processor."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(_ONEDNN._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
