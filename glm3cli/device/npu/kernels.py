"""Ascend's fused kernels behind the interface of `Kernels`, and what runs where on an NPU.

- Attention in training: `npu_fusion_attention`, with tensors in the order that Ascend calls SBH
  ([s, b, heads * d]), with the groups of keys and values as they are and one mask of 2048 x 2048
  for every sequence length. Packed samples run as TND ([b * s, heads, d]) with the lengths of the
  samples.
- Attention in inference: `npu_fused_infer_attention_score` on the KV cache where it is; the lengths
  of rows are passed as numbers, but as a mask in a graph, which keeps the numbers that it was
  captured with. The operator has no fp32, for which plain torch computes.
- `--quantize`: `npu_weight_quant_batchmatmul`, which makes numbers of 8 or 4 bits the weight again
  while it reads them (few_bits.py). It has no fp32, either, for which plain torch computes.
- Norms: `npu_rms_norm`. Activation: `npu_swiglu`.
- Rotary positions: `npu_rotary_mul`, interleaved and over the whole head, whose second half turns
  by an angle of zero.
- Loss: `npu_cross_entropy_loss` in fp32. Over several tensor parallel ranks megatron-core's
  vocab-parallel cross-entropy runs instead.
- `--mc2`: `npu_all_gather_base_mm` and `npu_mm_reduce_scatter_base`, which multiply and communicate
  at the same time. The option is off by default: they need one server whose NPUs are all joined,
  and the firmware, driver and CANN of one release.
- AdamW: MindSpeed's one-pass operator. Without MindSpeed it is torch's fused AdamW, which torch_npu
  computes by the same operator.

Everything else is the same code as on other devices: `--recompute`, `--distributed-optimizer`,
`--overlap-grad-reduce` and `--cp` (DeepSpeed-Ulysses) are megatron-core's and ours.
`--deterministic` also fixes the order of HCCL's sums. Operators are not compiled for each shape
(`jit_compile` is off), and the shapes of training never change. MindSpeed's swap-attention, which
moves activations to the host, is not here: it takes its settings from the global arguments of
megatron.training, which glm3 doesn't use; `--recompute` frees that memory instead.

The operators are called as `torch.ops.npu.NAME`, each with its own backward operator. This needs no
import of torch_npu, so that shapes and speeds can be planned on other machines (operators.py).
Every argument exists in torch_npu 2.7.1. The limits named below are from its documentation
(torch_npu/_op_plugin_docs.py).
"""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from glm3cli.device.choice import attend_stepwise
from glm3cli.device.dtypes import Quantized
from glm3cli.device.kernels import Kernels, Rotation, SavedForBackward
from glm3cli.device.npu import few_bits
from glm3cli.device.npu.packed import calls_for, ends_of_samples
from glm3cli.device.segments import BySegments

npu = torch.ops.npu

# The compressed mask of a causal sparse_mode has this size at any sequence length.
_MASK_SIZE = 2048
# The product of rows and heads that npu_rotary_mul, interleaved, stays below.
_ROTATED_HEADS = 1000
_CAUSAL = 2  # sparse_mode: the diagonal begins in the upper left corner
_CAUSAL_TO_THE_END = 3  # sparse_mode: the diagonal ends in the lower right corner


class NpuKernels(Kernels):
    """The operations as fused kernels of torch_npu, for training and decoding.

    Attributes:
        saved_for_backward: What these kernels save for the backward pass.
    """

    # npu_fusion_attention returns each row's maximum and sum, each of them eight times in fp32.
    saved_for_backward: ClassVar[SavedForBackward] = SavedForBackward(
        norm_copies=0, statistics=2 * 8 * 4, copies_values=True
    )

    def __init__(self) -> None:
        super().__init__()
        self._ends: BySegments[list[int]] = BySegments()

    def know_ends(self, segment_ids: Tensor, ends: Sequence[int]) -> None:
        """Keeps the ends, which would otherwise be found on the NPU, for all layers of a pass."""
        self._ends.put(segment_ids, list(ends))

    def rms_norm(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Calls npu_rms_norm; its input and 1 / rms in fp32 are saved for the backward pass."""
        return _RMSNorm.apply(hidden, weight, eps)  # type: ignore[no-untyped-call]

    def swiglu(self, gate_and_up: Tensor) -> Tensor:
        """Calls npu_swiglu; its input is saved for the backward pass."""
        return _SwiGLU.apply(gate_and_up)  # type: ignore[no-untyped-call]

    def rotation(self, angles: Tensor, dtype: torch.dtype) -> Rotation:
        """Returns cosines and sines for whole heads, since npu_rotary_mul turns all pairs.

        The second half of a head gets angles of zero.

        Args:
            angles: The angle of each position and pair, [s, b or 1, 1, d / 4], fp32.
            dtype: The type of the heads that will be rotated.

        Returns:
            Cosines and sines, [s, b or 1, 1, d] each.
        """
        angles = angles.repeat_interleave(2, dim=-1)
        angles = torch.cat([angles, torch.zeros_like(angles)], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(self, heads: Tensor, rotation: Rotation) -> Tensor:
        """Rotates in one pass over the heads, without cutting and joining their halves."""
        return _Rotate.apply(heads, *rotation)  # type: ignore[no-untyped-call]

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, segment_ids: Tensor | None
    ) -> Tensor:
        """Calls npu_fusion_attention as SBH, and for packed samples as one long TND sequence.

        SBH is how linear layers lay out their inputs and outputs, so that nothing is transposed.
        Values that are a view of the QKV tensor are copied: the view would keep the whole tensor
        in memory until the backward pass.
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
        ends = self._ends.get(segment_ids, lambda: ends_of_samples(segment_ids))
        contexts, start = [], 0
        for part in calls_for(ends):
            own = [tensor[start : part[-1]] for tensor in parts]
            within = [end - start for end in part]
            contexts.append(_FusionAttention.apply(*own, "TND", within, settings))  # type: ignore[no-untyped-call]
            start = part[-1]
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        return context.unflatten(0, segment_ids.shape).transpose(0, 1)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        is_causal: bool = False,
    ) -> Tensor:
        """Computes in single operations what the operators here have no types for."""
        return attend_stepwise(query, key, value, mask, scale, is_causal)

    def turns(self, angles: Tensor, dtype: torch.dtype) -> Any:
        """Returns cosines and sines for whole heads in every type."""
        return self.rotation(angles[:, None, None], dtype)

    def seen(self, ends: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
        """Returns the lengths as numbers, which the operator takes; in fp32 torch's mask."""
        if dtype == torch.float32:
            return super().seen(ends, dtype, device)
        return list(ends), None

    def seen_until(self, ends: Tensor, length: int, capacity: int, dtype: torch.dtype) -> Any:
        """Returns one length for all rows, and the mask of a single query; True means hidden.

        The mask, (B, 1, 1, KV_S), is as long as the rows are, whatever the length.
        """
        if dtype == torch.float32:
            return super().seen_until(ends, length, capacity, dtype)
        hidden = torch.arange(capacity, device=ends.device) >= ends.unsqueeze(1)
        return [length], hidden[:, None, None]

    def attend_one(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, seen: Any
    ) -> Tensor:
        """Calls npu_fused_infer_attention_score on the cache where it is; plain torch in fp32."""
        if query.dtype == torch.float32:
            return super().attend_one(query, keys, values, scale, seen)
        ends, hidden = seen
        options = {} if hidden is None else {"atten_mask": hidden}
        rows = query.flatten(1, 2).unsqueeze(2).contiguous()  # [b, heads, 1, d]
        return _cached_attention(rows, keys, values, scale, ends, **options).view(query.shape)

    def attend_chunk(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, start: int
    ) -> Tensor:
        """Calls npu_fused_infer_attention_score with a mask whose diagonal ends at the last slot.

        In fp32 plain torch computes.
        """
        if query.dtype == torch.float32:
            return super().attend_chunk(query, keys, values, scale, start)
        length = query.size(0)
        options: dict[str, Any] = {}
        if length > 1:
            options = {
                "atten_mask": _causal_mask(query.device),
                "sparse_mode": _CAUSAL if start == 0 else _CAUSAL_TO_THE_END,
            }
        rows = query.transpose(0, 1).unsqueeze(0).contiguous()  # [1, heads, s, d]
        ends = [start + length]
        cached = (keys.unsqueeze(0), values.unsqueeze(0))
        return _cached_attention(rows, *cached, scale, ends, **options)[0].transpose(0, 1)

    def pack_quantized(self, weight: Quantized, dtype: torch.dtype) -> Any:
        """Returns the weight in parts for npu_weight_quant_batchmatmul; as it is if that can't."""
        return few_bits.pack(weight, dtype) if few_bits.is_taken(weight, dtype) else weight

    def linear_quantized(self, hidden: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        """Calls npu_weight_quant_batchmatmul, once for each part of the weight."""
        if isinstance(packed, Quantized):
            return super().linear_quantized(hidden, packed, bias)
        return few_bits.multiply(hidden, packed, bias)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Calls npu_cross_entropy_loss on fp32 logits, since its loss has its input's type."""
        return _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]

    def gather_matmul(self, rows: Tensor, matrix: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        """Calls npu_all_gather_base_mm (MC2), which multiplies rows while others travel.

        It is for 16-bit types, for 2, 4 or 8 ranks whose NPUs are all joined, and for k >= 256.
        """
        name = self.hccl_name(group)
        product, gathered = npu.npu_all_gather_base_mm(rows, matrix, name, group.size())
        return product, gathered

    def matmul_scatter(self, rows: Tensor, matrix: Tensor, group: Any) -> Tensor:
        """Calls npu_mm_reduce_scatter_base (MC2), with the limits of `gather_matmul`."""
        name = self.hccl_name(group)
        return npu.npu_mm_reduce_scatter_base(rows, matrix, name, group.size())

    def hccl_name(self, group: Any) -> str:
        """Returns the name by which HCCL knows a process group on this rank."""
        backend = group._get_backend(torch.device("npu"))
        return str(backend.get_hccl_comm_name(dist.get_rank()))


@functools.lru_cache(maxsize=1)
def _causal_mask(device: torch.device) -> Tensor:
    """Returns the mask that every causal sparse_mode takes; True means hidden."""
    ones = torch.ones((_MASK_SIZE, _MASK_SIZE), dtype=torch.bool, device=device)
    return ones.triu(diagonal=1)


def _cached_attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, ends: list[int], **options: Any
) -> Tensor:
    """Calls npu_fused_infer_attention_score on queries [b, heads, s, d] and rows of a cache.

    Slots that are not yet written, or belong to nobody any more, are excluded by `ends`: how many
    the last query of each row sees, or one number for all rows, beside a mask.
    """
    context, _ = npu.npu_fused_infer_attention_score(
        query,
        keys,
        values,
        actual_seq_lengths_kv=ends,
        num_heads=query.size(1),
        num_key_value_heads=keys.size(1),
        scale=scale,
        input_layout="BNSD",
        **options,
    )
    return context


class _RMSNorm(torch.autograd.Function):
    """npu_rms_norm with its backward operator."""

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
    """npu_swiglu with its backward operator."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        return npu.npu_swiglu(gate_and_up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        [gate_and_up] = ctx.saved_tensors
        return npu.npu_swiglu_backward(grads[0], gate_and_up)


class _Rotate(torch.autograd.Function):
    """npu_rotary_mul, whose gradient is the inverse rotation.

    Its own backward operator, npu_rotary_mul_backward, would need the input, which isn't saved.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.rotation = cosines, sines
        return _rotated(heads, cosines, sines)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.rotation
        return _rotated(grads[0], cosines, -sines), None, None


def _rotated(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotates heads [s, b, heads, d] by angles [s, b or 1, 1, d].

    The interleaved mode takes heads as SBND with angles of the shape S11D only, and less than a
    thousand rows x heads. Where each row of the batch has angles of its own, or there are too many,
    positions and rows are therefore flattened into one dimension.
    """
    rows, count = heads.size(1), heads.size(2)
    if cosines.size(1) == 1 and (rows == 1 or rows * count < _ROTATED_HEADS):
        return npu.npu_rotary_mul(heads, cosines, sines, rotary_mode="interleave")
    flat = heads.flatten(0, 1).unsqueeze(1)  # [s * b, 1, heads, d]
    shape = (-1, rows, -1, -1)
    angles = [tensor.expand(shape).flatten(0, 1).unsqueeze(1) for tensor in (cosines, sines)]
    return npu.npu_rotary_mul(flat, *angles, rotary_mode="interleave").view(heads.shape)


class _FusionAttention(torch.autograd.Function):
    """Causal npu_fusion_attention with its backward operator.

    The context and each row's maximum and sum (fp32) are saved instead of the scores.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        input_layout: str,
        ends: list[int] | None,
        settings: dict[str, Any],
    ) -> Tensor:
        mask = _causal_mask(query.device)
        context, largest, total, *_ = npu.npu_fusion_attention(
            query,
            key,
            value,
            input_layout=input_layout,
            atten_mask=mask,
            sparse_mode=_CAUSAL,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            **settings,
        )
        ctx.save_for_backward(query, key, value, context, largest, total)
        ctx.input_layout, ctx.ends, ctx.settings = input_layout, ends, settings
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
            ctx.input_layout,
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
    """npu_cross_entropy_loss with its backward operator."""

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
