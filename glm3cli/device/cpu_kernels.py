"""What a CPU computes otherwise than plain torch does: linear layers, attention, and small parts.

A decoded token multiplies each weight by one row, or by a few. MKL, which torch calls for them in
fp32, multiplies one row on a single thread, and a few rows at half the speed of oneDNN with weights
that it has laid out for itself.

In training MKL multiplies many rows. On processors that aren't Intel's it uses AVX2 even where they
have AVX-512, which oneDNN uses: on a Zen 4 that is 9 to 14 % faster. `PRODUCTS` are the redirects
that put it in MKL's place there. The gradients of weights stay with MKL, which adds to `main_grad`
while it multiplies: torch offers no such product of oneDNN's.

Attention of some hundreds of positions, and of packs, is `functions.attention`: two thirds of the
time of torch's own, which is made for longer sequences, and computes whole squares of packs. Norms
and rotations, too, are those of `functions` that take the fewest passes over memory.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from glm3cli.device import functions
from glm3cli.device.base import require_active
from glm3cli.device.dtypes import Quantized
from glm3cli.device.kernels import Kernels, Rotation, SavedForBackward
from glm3cli.device.redirects import Redirect

_ONEDNN = torch.ops.mkldnn
# oneDNN 3.12 multiplies three to six rows by another program than one or two, which loads a weight
# from memory 1.3 to 1.6 times as fast (on Zen 4). Fewer rows get zeros beside them.
_LEAST_ROWS = 5
# Of fewer positions the products are too small. From so many on torch's attention takes the queries
# of a head in blocks of 256 instead of 64 (FlashAttentionKernel.cpp), and is as fast.
_FEW_POSITIONS, _MANY_POSITIONS = 512, 768
_PROCESSOR = Path("/proc/cpuinfo")
# Of torch's kernel for 4 bits, which takes outputs in blocks of so many.
_BLOCK = 16


class CpuKernels(Kernels):
    """Plain torch, with attention and norms of its own in training, linear layers in inference."""

    saved_for_backward: ClassVar[SavedForBackward] = replace(
        Kernels.saved_for_backward, norm_copies=1
    )
    composed: ClassVar[frozenset[str]] = frozenset({"rms-norm", "rotary"})

    def rms_norm(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Computes it with a gradient of its own."""
        return functions.rms_norm(hidden, weight, eps)

    def rotate(self, heads: Tensor, rotation: Rotation) -> Tensor:
        """Multiplies pairs as complex numbers, which torch has of 32 bits and of 64."""
        is_wide = heads.dtype in (torch.float32, torch.float64)
        return functions.rotate(heads, *rotation, as_complex=is_wide)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, segment_ids: Tensor | None
    ) -> Tensor:
        """Computes it in products of MKL's over all heads, where that is the faster way."""
        if _attends_in_blocks(query, is_packed=segment_ids is not None):
            return functions.attention(query, key, value, scale, segment_ids)
        return super().attention(query, key, value, scale, segment_ids)

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


def _attends_in_blocks(query: Tensor, *, is_packed: bool) -> bool:
    """Returns whether `functions.attention` is faster than torch's, to which packs are a mask."""
    return (
        query.dtype == torch.float32
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and query.size(0) >= _FEW_POSITIONS
        and (is_packed or query.size(0) < _MANY_POSITIONS)
    )


def _is_multiplied(weight: Tensor) -> bool:
    """Returns whether oneDNN multiplies by this weight on this processor."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(_ONEDNN._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class _Products(TorchFunctionMode):
    """Multiplies by oneDNN, instead of by MKL, where torch.matmul is called within its block."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls the function, or oneDNN in its place."""
        if function in (torch.matmul, torch.Tensor.matmul) and _is_product(*args):
            left, right = args
            rows = left.view(-1, left.size(-1))
            product = _ONEDNN._linear_pointwise(rows, right.t(), None, "none", [], "")
            # As torch's own matmul does: autograd wouldn't let a view be changed in place.
            return torch.ops.aten._unsafe_view(product, (*left.shape[:-1], right.size(1)))
        return function(*args, **(kwargs or {}))


def _is_product(left: Tensor, right: Tensor) -> bool:
    """Returns whether oneDNN multiplies these as they are; it would copy rows that are columns."""
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and right.dim() == 2
        and left.numel() > 0
        and left.is_contiguous()
    )


def _multiplies_slowly() -> bool:
    """Returns whether MKL leaves AVX-512 unused, as it does on what isn't Intel's."""
    return (
        torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _PROCESSOR.exists()
        and "GenuineIntel" not in _PROCESSOR.read_text()
    )


def _by_onednn(original: Callable[..., Any]) -> Any:
    """Replaces a pass of an autograd function by one that multiplies with what is faster here."""
    if not _multiplies_slowly():
        return staticmethod(original)

    @functools.wraps(original)
    def multiply(*args: Any) -> Any:
        if "linear" in require_active().without_kernels:
            return original(*args)
        with _Products():
            return original(*args)

    return staticmethod(multiply)


_LAYERS = "megatron.core.tensor_parallel.layers"
PRODUCTS = tuple(
    Redirect(f"{_LAYERS}.{name}", direction, _by_onednn, "tensor_parallel/layers.py: its products")
    for name in ("LinearWithGradAccumulationAndAsyncCommunication", "LinearWithFrozenWeight")
    for direction in ("forward", "backward")
)
