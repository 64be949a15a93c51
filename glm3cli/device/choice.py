"""`without`: kernels that compute some operations in plain torch (`--without-kernel`).

An operator of a chip may be wrong, or fail, with some version of its library. A command then works
without that one alone. Plain torch means single steps here: attention makes its scores, which the
operators of no chip are asked to fuse.
"""

from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from glm3cli.device.kernels import Kernels, SavedForBackward

# The methods of `Kernels` behind each name that --without-kernel takes. AdamW and the graphs of
# decoding have none: a device says whether they are used (`fuses_adamw`, `captures_steps`).
METHODS: Mapping[str, tuple[str, ...]] = {
    "rms-norm": ("rms_norm",),
    "swiglu": ("swiglu",),
    "rotary": ("rotation", "rotate"),
    "attention": ("attention",),
    "decode-attention": ("seen", "seen_until", "attend_one", "attend_chunk"),
    "decode-graph": (),
    "cross-entropy": ("cross_entropy",),
    "linear": ("pack", "linear"),
    "quantized-linear": ("pack_quantized", "linear_quantized"),
    "mc2": ("gather_matmul", "matmul_scatter"),
    "adamw": (),
}

# The operators of chips, by torch's names, that compute them in training.
OPERATORS: Mapping[str, tuple[str, ...]] = {
    "rms-norm": ("npu_rms_norm", "_fused_rms_norm"),
    "swiglu": ("npu_swiglu",),
    "rotary": ("npu_rotary_mul",),
    "attention": (
        "npu_fusion_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "baddbmm",  # of `functions.attention`; plain torch's has bmm
    ),
    "cross-entropy": ("npu_cross_entropy_loss",),
    "mc2": ("npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"),
    "adamw": ("npu_apply_adam_w", "_fused_adamw_"),
}
_REASONS = {
    "cross-entropy": "over several tensor parallel ranks the loss is megatron-core's",
    "mc2": "--mc2 isn't given",
}


class StepwiseKernels(Kernels):
    """Plain torch, with attention in single operations on every chip."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        is_causal: bool = False,
    ) -> Tensor:
        """Makes the scores, their softmax and the context one after the other.

        torch's own attention would call a fused operator where a chip has one, whatever its
        settings say (op-plugin, FusedSdpChoiceKernelNpuOpApi.cpp).
        """
        return attend_stepwise(query, key, value, mask, scale, is_causal)


def attend_stepwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Computes what `Kernels.attend` does, with torch's own composition of matrix products."""
    context, _ = torch.ops.aten._scaled_dot_product_attention_math(
        query,
        key,
        value,
        mask,
        0.0,
        is_causal,
        scale=scale,
        enable_gqa=query.size(1) != key.size(1),
    )
    return context


def without(kernels: Kernels, names: Collection[str]) -> Kernels:
    """Returns kernels that compute the named operations in plain torch, and the others as before.

    Args:
        kernels: The kernels of the device.
        names: The operations, as --without-kernel names them.
    """
    plain, chosen = StepwiseKernels(), copy(kernels)
    for name in names:
        for method in METHODS[name]:
            setattr(chosen, method, getattr(plain, method))
    return chosen


def reason_unused(name: str, chips: type[Kernels], left_out: Collection[str]) -> str:
    """Returns why a training has not used a chip's operator.

    Args:
        name: The operation, as --without-kernel names it.
        chips: The class of the chip's kernels.
        left_out: The operations that plain torch computes because a user wants it.
    """
    if name in left_out:
        return "--without-kernel"
    methods = METHODS[name]
    is_plain = methods and all(getattr(chips, one) is getattr(Kernels, one) for one in methods)
    if is_plain or name in chips.composed:
        return "this chip has none"
    return _REASONS.get(name, "nothing has called it")


def saved_without(saved: SavedForBackward, names: Collection[str]) -> SavedForBackward:
    """Returns what kernels save for the backward pass without the named operations."""
    plain = Kernels.saved_for_backward
    if "rms-norm" in names:
        saved = replace(saved, norm_copies=plain.norm_copies)
    if "attention" in names:
        saved = replace(
            saved, statistics=plain.statistics, copies_values=plain.copies_values, scores=True
        )
    return saved
