"""Ascend's fused operators for meta tensors: their names, arguments, and results' shapes and types.

With these definitions a model that calls `torch.ops.npu.NAME` runs on meta tensors on any machine,
without Ascend's library, so that what it would do on an NPU can be counted. They are the operators
that `NpuKernels` calls, but for those of `--mc2`. The schemas are those of torch_npu 2.7.1, whose
later releases add arguments at the end; the shapes are from its documentation (_op_plugin_docs.py).
"""

from typing import Any

import torch
from torch import Tensor

SCHEMAS = (
    "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    "npu_rms_norm_backward(Tensor dy, Tensor input, Tensor gamma, Tensor rstd) -> (Tensor, Tensor)",
    "npu_swiglu(Tensor input, int dim=-1) -> Tensor",
    "npu_swiglu_backward(Tensor grad_output, Tensor input, int dim=-1) -> Tensor",
    "npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode='half') -> Tensor",
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., "
    "float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, "
    "int inner_precise=0, int[]? prefix=None, int[]? actual_seq_qlen=None, "
    "int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    'bool sync=False, str softmax_layout="", Tensor? sink=None) '
    "-> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
    "npu_fusion_attention_grad(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, "
    "str input_layout, *, Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, "
    "Tensor? softmax_max=None, Tensor? softmax_sum=None, Tensor? softmax_in=None, "
    "Tensor? attention_in=None, float scale_value=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int seed=0, "
    "int offset=0, int numels=0, int[]? prefix=None, int[]? actual_seq_qlen=None, "
    "int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    'bool sync=False, str softmax_layout="", Tensor? sink=None) '
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, "
    "Tensor? pse_shift=None, Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None, "
    "SymInt[]? actual_seq_lengths_kv=None, Tensor? dequant_scale1=None, "
    "Tensor? quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None, "
    "Tensor? quant_offset2=None, Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, "
    "Tensor? key_antiquant_scale=None, Tensor? key_antiquant_offset=None, "
    "Tensor? value_antiquant_scale=None, Tensor? value_antiquant_offset=None, "
    "Tensor? block_table=None, Tensor? query_padding_size=None, Tensor? kv_padding_size=None, "
    "Tensor? key_shared_prefix=None, Tensor? value_shared_prefix=None, "
    "SymInt[]? actual_shared_prefix_len=None, Tensor? query_rope=None, Tensor? key_rope=None, "
    "Tensor? key_rope_antiquant_scale=None, int num_heads=1, float scale=1.0, "
    'int pre_tokens=2147483647, int next_tokens=2147483647, str input_layout="BSH", '
    "int num_key_value_heads=0, int sparse_mode=0, int inner_precise=0, int block_size=0, "
    "int antiquant_mode=0, int key_antiquant_mode=0, int value_antiquant_mode=0, "
    "bool softmax_lse_flag=False) -> (Tensor, Tensor)",
    "npu_cross_entropy_loss(Tensor input, Tensor target, Tensor? weight=None, "
    "str reduction='mean', int ignore_index=-100, float label_smoothing=0.0, "
    "float lse_square_scale_for_zloss=0.0, bool return_zloss=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "npu_cross_entropy_loss_backward(Tensor grad_loss, Tensor log_prob, Tensor target, "
    "Tensor? weight=None, Tensor? grad_zloss=None, Tensor? lse_for_zloss=None, "
    "str reduction='mean', int ignore_index=-100, float label_smoothing=0.0, "
    "float lse_square_scale_for_zloss=0.0) -> Tensor",
    "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, "
    "Tensor? antiquant_offset=None, Tensor? quant_scale=None, Tensor? quant_offset=None, "
    "Tensor? bias=None, int antiquant_group_size=0, int inner_precise=0, "
    "int? weight_dtype=None) -> Tensor",
    "npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles=0) -> Tensor",
)

# Keeps the definitions: a library takes them back when it goes.
_libraries: list[Any] = []


def define() -> None:
    """Defines the operators for meta tensors, unless torch_npu has defined them.

    A second call does nothing.
    """
    if hasattr(torch.ops.npu, "npu_rms_norm"):
        return
    library: Any = torch.library.Library("npu", "DEF")  # type: ignore[no-untyped-call]
    for schema in SCHEMAS:
        library.define(schema)
        name = schema.partition("(")[0]
        library.impl(name, _SHAPES[name], "Meta")
    _libraries.append(library)


def _rms_norm(hidden: Tensor, weight: Tensor, _epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Returns the normed tensor and 1 / rms in fp32."""
    kept = hidden.dim() - weight.dim()
    inverse = hidden.new_empty((*hidden.shape[:kept], *[1] * weight.dim()), dtype=torch.float32)
    return torch.empty_like(hidden), inverse


def _rms_norm_backward(
    _grad: Tensor, hidden: Tensor, weight: Tensor, _inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the input and, in fp32, of the weight."""
    return torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)


def _swiglu(gate_and_up: Tensor, dim: int = -1) -> Tensor:
    """Returns the activation, half as long in dimension `dim`."""
    shape = list(gate_and_up.shape)
    shape[dim] //= 2
    return gate_and_up.new_empty(shape)


def _swiglu_backward(_grad: Tensor, gate_and_up: Tensor, dim: int = -1) -> Tensor:
    """Returns the gradient of the input."""
    return torch.empty_like(gate_and_up)


def _rotary_mul(heads: Tensor, _cosines: Tensor, _sines: Tensor, rotary_mode: str = "") -> Tensor:
    """Returns the rotated heads, contiguous."""
    return torch.empty_like(heads, memory_format=torch.contiguous_format)


def _fusion_attention(
    query: Tensor,
    _key: Tensor,
    value: Tensor,
    heads: int,
    input_layout: str,
    *_options: Any,
    **_more: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Returns the context and two fp32 statistics of each row, and what isn't used here.

    Each statistic is there eight times, since 32 bytes are the least that the chip moves.
    """
    if input_layout == "TND":
        rows: tuple[int, ...] = (query.size(0), heads, 8)
        context = query.new_empty((*query.shape[:2], value.size(2)))
    elif input_layout == "SBH":
        rows = (query.size(1), heads, query.size(0), 8)
        context = torch.empty_like(query)
    else:
        raise NotImplementedError(f"input_layout {input_layout}: NpuKernels uses SBH and TND")
    largest, total = (query.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return context, largest, total, query.new_empty((0,)), 0, 0, 0


def _fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, *_options: Any, **_more: Any
) -> tuple[Tensor, ...]:
    """Returns the gradients of queries, keys, and values, and two empty tensors."""
    of_inputs = (torch.empty_like(tensor) for tensor in (query, key, value))
    return (*of_inputs, query.new_empty((0,)), query.new_empty((0,)))


def _fused_infer_attention_score(
    query: Tensor, _key: Tensor, _value: Tensor, *_options: Any, **_more: Any
) -> tuple[Tensor, Tensor]:
    """Returns the context, [batch, heads, s, d] (BNSD) like the queries, and unused statistics."""
    return torch.empty_like(query), query.new_empty((1,), dtype=torch.float32)


def _cross_entropy_loss(
    logits: Tensor,
    _labels: Tensor,
    _weight: Any = None,
    reduction: str = "mean",
    *_options: Any,
    **_more: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns losses, log-probabilities, and two empty tensors; logits are [rows, vocabulary]."""
    losses = logits.new_empty(logits.shape[:1] if reduction == "none" else (1,))
    return losses, torch.empty_like(logits), logits.new_empty((0,)), logits.new_empty((0,))


def _cross_entropy_loss_backward(
    _grad: Tensor, log_probabilities: Tensor, *_options: Any, **_more: Any
) -> Tensor:
    """Returns the gradient of the logits."""
    return torch.empty_like(log_probabilities)


def _weight_quant_batchmatmul(
    hidden: Tensor, _weight: Tensor, scales: Tensor, *_options: Any, **_more: Any
) -> Tensor:
    """Returns the product, [n, out]; scales are [1 or groups, out]."""
    return hidden.new_empty((hidden.size(0), scales.size(-1)))


def _convert_weight_to_int4pack(weight: Tensor, _inner_k_tiles: int = 0) -> Tensor:
    """Returns eight numbers of 4 bits in one of 32, along the last dimension."""
    return weight.new_empty((*weight.shape[:-1], weight.size(-1) // 8))


_SHAPES = {
    "npu_rms_norm": _rms_norm,
    "npu_rms_norm_backward": _rms_norm_backward,
    "npu_swiglu": _swiglu,
    "npu_swiglu_backward": _swiglu_backward,
    "npu_rotary_mul": _rotary_mul,
    "npu_fusion_attention": _fusion_attention,
    "npu_fusion_attention_grad": _fusion_attention_grad,
    "npu_fused_infer_attention_score": _fused_infer_attention_score,
    "npu_cross_entropy_loss": _cross_entropy_loss,
    "npu_cross_entropy_loss_backward": _cross_entropy_loss_backward,
    "npu_weight_quant_batchmatmul": _weight_quant_batchmatmul,
    "npu_convert_weight_to_int4pack": _convert_weight_to_int4pack,
}
