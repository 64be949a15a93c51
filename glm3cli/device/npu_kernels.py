"""Ascend's fused kernels behind the interface of `Kernels`.

They are called as `torch.ops.npu.NAME`, the operators themselves: each with its own backward
operator, and without an import of torch_npu, so that shapes and speeds can be planned elsewhere.
Every argument exists in torch_npu 2.7.1. The limits named below are from its documentation
(torch_npu/_op_plugin_docs.py).
"""

import functools
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from glm3cli.device.kernels import Kernels, Rotation, SavedForBackward
from glm3cli.model.cache import CacheWindow

npu = torch.ops.npu

# The compressed mask of a causal sparse_mode has this size at any sequence length.
_MASK_SIZE = 2048
_CAUSAL = 2  # sparse_mode: the diagonal begins in the upper left corner
_CAUSAL_TO_THE_END = 3  # sparse_mode: the diagonal ends in the lower right corner


class NpuKernels(Kernels):
    """Fused kernels for training and decoding."""

    # npu_fusion_attention returns each row's maximum and sum eight times.
    saved_for_backward: ClassVar[SavedForBackward] = SavedForBackward(
        norm_copies=0, statistics=2 * 8 * 4, copies_values=True
    )

    def __init__(self) -> None:
        super().__init__()
        self._lengths: Any = WeakIdKeyDictionary()

    def rms_norm(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Keeps its input, and 1 / rms in fp32."""
        return _RMSNorm.apply(hidden, weight, eps)  # type: ignore[no-untyped-call]

    def swiglu(self, gate_and_up: Tensor) -> Tensor:
        """Keeps its input."""
        return _SwiGLU.apply(gate_and_up)  # type: ignore[no-untyped-call]

    def rotation(self, angles: Tensor, dtype: torch.dtype) -> Rotation:
        """Angles of whole heads: the operator turns all pairs, the second half by nothing.

        [s, b or 1, 1, width / 4] -> [s, b or 1, 1, width].
        """
        angles = angles.repeat_interleave(2, dim=-1)
        angles = torch.cat([angles, torch.zeros_like(angles)], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(self, heads: Tensor, rotation: Rotation) -> Tensor:
        """One pass over the heads, without cutting and joining their halves."""
        return _Rotate.apply(heads, *rotation)  # type: ignore[no-untyped-call]

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, segment_ids: Tensor | None
    ) -> Tensor:
        """As SBH, which is what linear layers give and take; packs as one long TND sequence.

        A value that is a view of all of QKV is copied: the whole would be kept for its sake.
        """
        settings: dict[str, Any] = {"head_num": query.size(2), "scale": scale}
        if segment_ids is None:
            parts = [tensor.flatten(2).contiguous() for tensor in (query, key, value)]
            context = _FusionAttention.apply(*parts, "SBH", None, settings)  # type: ignore[no-untyped-call]
            return context.view(query.shape)
        # [s, b, n, d] -> [b * s, n, d], row after row.
        parts = [
            tensor.transpose(0, 1).flatten(0, 1).contiguous() for tensor in (query, key, value)
        ]
        ends = self._ends_of_samples(segment_ids)
        context = _FusionAttention.apply(*parts, "TND", ends, settings)  # type: ignore[no-untyped-call]
        return context.unflatten(0, segment_ids.shape).transpose(0, 1)

    def _ends_of_samples(self, segment_ids: Tensor) -> list[int]:
        """Where the samples of packs [b, s] end in b * s positions; found once for all layers."""
        if segment_ids not in self._lengths:
            changes = torch.ones_like(segment_ids, dtype=torch.bool)
            changes[:, :-1] = segment_ids[:, 1:] != segment_ids[:, :-1]
            ends = (changes.flatten().nonzero().flatten() + 1).tolist()
            self._lengths[segment_ids] = ends
        return list(self._lengths[segment_ids])

    def cached_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: CacheWindow
    ) -> Tensor:
        """Reads the cache where it is: what is padding or not yet written is told in segment_ids.

        The operator has no fp32, for which plain torch stays.
        """
        if query.dtype == torch.float32:
            return super().cached_attention(query, keys, values, scale, window)
        length, device = query.size(0), query.device
        end = window.start + length
        options: dict[str, Any] = {}
        if length > 1:
            options = {
                "atten_mask": _causal_mask(device),
                "sparse_mode": _CAUSAL if window.start == 0 else _CAUSAL_TO_THE_END,
                "actual_seq_lengths": [
                    length - max(pads - window.start, 0) for pads in window.padding
                ],
                "query_padding_size": _number(0, device),
            }
        context, _ = npu.npu_fused_infer_attention_score(
            query.permute(1, 2, 0, 3).contiguous(),
            keys,
            values,
            actual_seq_lengths_kv=[end - pads for pads in window.padding],
            kv_padding_size=_number(keys.size(2) - end, device),
            num_heads=query.size(2),
            num_key_value_heads=keys.size(1),
            scale=scale,
            input_layout="BNSD",
            **options,
        )
        return context.permute(2, 0, 1, 3)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """In fp32: the operator's loss has the type of its input."""
        return _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]

    def gather_matmul(self, rows: Tensor, matrix: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        """MC2; for 16 bits, 2, 4 or 8 ranks that are joined with each other, and k >= 256."""
        name = self.hccl_name(group)
        product, gathered = npu.npu_all_gather_base_mm(rows, matrix, name, group.size())
        return product, gathered

    def matmul_scatter(self, rows: Tensor, matrix: Tensor, group: Any) -> Tensor:
        """MC2, with the same limits."""
        name = self.hccl_name(group)
        return npu.npu_mm_reduce_scatter_base(rows, matrix, name, group.size())

    def hccl_name(self, group: Any) -> str:
        """What HCCL calls the group on this rank."""
        backend = group._get_backend(torch.device("npu"))
        return str(backend.get_hccl_comm_name(dist.get_rank()))


@functools.lru_cache(maxsize=1)
def _causal_mask(device: torch.device) -> Tensor:
    """The mask of a causal sparse_mode; True is hidden."""
    ones = torch.ones((_MASK_SIZE, _MASK_SIZE), dtype=torch.bool, device=device)
    return ones.triu(diagonal=1)


@functools.lru_cache(maxsize=64)
def _number(value: int, device: torch.device) -> Tensor:
    """A number that an operator wants as a tensor; copied once for all layers."""
    return torch.tensor([value], dtype=torch.int64, device=device)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = npu.npu_rms_norm(hidden, weight, epsilon=eps)
        ctx.save_for_backward(hidden, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        hidden, weight, inverse = ctx.saved_tensors
        of_hidden, of_weight = npu.npu_rms_norm_backward(grads[0], hidden, weight, inverse)
        return of_hidden, of_weight.to(weight.dtype), None  # it comes in fp32


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        return npu.npu_swiglu(gate_and_up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        [gate_and_up] = ctx.saved_tensors
        return npu.npu_swiglu_backward(grads[0], gate_and_up)


class _Rotate(torch.autograd.Function):
    """The gradient is the rotation the other way; npu_rotary_mul_backward would want the input."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.rotation = cosines, sines
        return _rotated(heads, cosines, sines)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.rotation
        return _rotated(grads[0], cosines, -sines), None, None


def _rotated(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Interleaved mode takes SBND with angles S11D alone: rows of their own become positions."""
    if cosines.size(1) == 1:
        return npu.npu_rotary_mul(heads, cosines, sines, rotary_mode="interleave")
    flat = heads.flatten(0, 1).unsqueeze(1)  # [s * b, 1, heads, d]
    angles = [tensor.flatten(0, 1).unsqueeze(1) for tensor in (cosines, sines)]
    return npu.npu_rotary_mul(flat, *angles, rotary_mode="interleave").view(heads.shape)


class _FusionAttention(torch.autograd.Function):
    """Causal; keeps the result and two fp32 numbers per row instead of the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: str,
        ends: list[int] | None,
        settings: dict[str, Any],
    ) -> Tensor:
        mask = _causal_mask(query.device)
        context, largest, total, *_ = npu.npu_fusion_attention(
            query,
            key,
            value,
            input_layout=layout,
            atten_mask=mask,
            sparse_mode=_CAUSAL,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            **settings,
        )
        ctx.save_for_backward(query, key, value, context, largest, total)
        ctx.layout, ctx.ends, ctx.settings = layout, ends, settings
        return context

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        query, key, value, context, largest, total = ctx.saved_tensors
        of_query, of_key, of_value, *_ = npu.npu_fusion_attention_grad(
            query,
            key,
            value,
            grads[0].contiguous(),
            ctx.settings["head_num"],
            ctx.layout,
            atten_mask=_causal_mask(query.device),
            softmax_max=largest,
            softmax_sum=total,
            attention_in=context,
            scale_value=ctx.settings["scale"],
            sparse_mode=_CAUSAL,
            actual_seq_qlen=ctx.ends,
            actual_seq_kvlen=ctx.ends,
        )
        return of_query, of_key, of_value, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        rows = logits.flatten(0, -2).float()
        losses, log_probabilities, _, _ = npu.npu_cross_entropy_loss(
            rows, labels.flatten(), reduction="none"
        )
        ctx.save_for_backward(log_probabilities, labels)
        ctx.dtype = logits.dtype
        return losses.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        log_probabilities, labels = ctx.saved_tensors
        of_rows = npu.npu_cross_entropy_loss_backward(
            grads[0].flatten(), log_probabilities, labels.flatten(), reduction="none"
        )
        return of_rows.view(*labels.shape, -1).to(ctx.dtype), None
