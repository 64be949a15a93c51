"""What a CPU computes otherwise than plain torch does: the linear layers of inference.

A decoded token multiplies each weight by one row, or by a few. MKL, which torch calls for them in
fp32, multiplies one row on a single thread, and a few rows at half the speed of oneDNN with weights
that it has laid out for itself.
"""

import torch
from torch import Tensor

from glm3cli.device.kernels import Kernels

_ONEDNN = torch.ops.mkldnn


class CpuKernels(Kernels):
    """Plain torch, with oneDNN's linear layers in inference."""

    def pack(self, weight: Tensor) -> Tensor:
        """Returns a weight in oneDNN's own layout, or as it is where oneDNN can't multiply it."""
        return _ONEDNN._reorder_linear_weight(weight, None) if _is_multiplied(weight) else weight

    def linear(self, hidden: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """Multiplies by oneDNN if the weight is in its layout."""
        if not packed.is_mkldnn:
            return super().linear(hidden, packed, bias)
        return _ONEDNN._linear_pointwise(hidden, packed, bias, "none", [], "")


def _is_multiplied(weight: Tensor) -> bool:
    """Returns whether oneDNN multiplies by this weight on this processor."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(_ONEDNN._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
