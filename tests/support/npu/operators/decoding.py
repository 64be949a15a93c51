"""Attention of decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.npu.operators.attention import hidden_scores, scores_of
from tests.support.npu.operators.kernel import FLOATS, kernel, require


@kernel
def npu_fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    schema = torch.ops.npu.npu_fused_infer_attention_score.default._schema
    names = [argument.name for argument in schema.arguments[3:]]
    given = dict(zip(names, arguments, strict=True))
    used = {
        *("atten_mask", "actual_seq_lengths", "actual_seq_lengths_kv", "query_padding_size"),
        *("kv_padding_size", "num_heads", "scale", "input_layout", "num_key_value_heads"),
        *("sparse_mode", "pre_tokens", "next_tokens"),
    }
    for name, value_of in given.items():
        default = next(a.default_value for a in schema.arguments if a.name == name)
        require(name in used or value_of == default, f"{name} is not emulated")
    require(given["input_layout"] == "BNSD", "the emulation has BNSD only")
    require(query.dtype == key.dtype == value.dtype, "query, key and value differ in type")
    require(query.dtype in FLOATS[:2], f"npu_fused_infer_attention_score: no {query.dtype}")
    for tensor in (query, key, value):
        require(tensor.is_contiguous(), "npu_fused_infer_attention_score: not contiguous")
    require(given["num_heads"] == query.size(1), "num_heads is not the query's N")
    groups = given["num_key_value_heads"] or given["num_heads"]
    require(groups == key.size(1), "num_key_value_heads is not the key's N")
    context = torch.zeros_like(query)
    for row in range(query.size(0)):
        q_from, q_to = _valid(
            query.size(2), given["actual_seq_lengths"], given["query_padding_size"], row
        )
        if query.size(2) == 1:
            q_from, q_to = 0, 1  # neither lengths of queries nor sparse_mode count
        k_from, k_to = _valid(
            key.size(2), given["actual_seq_lengths_kv"], given["kv_padding_size"], row
        )
        mask, mode = given["atten_mask"], given["sparse_mode"]
        lengths = q_to - q_from, k_to - k_from
        if query.size(2) == 1:
            hidden = (
                None if mask is None else _hidden_from_one(query, key, mask)[row, :, k_from:k_to]
            )
        else:
            hidden = hidden_scores(*lengths, mask, mode)
        q = query[row, :, q_from:q_to].transpose(0, 1)
        k, v = (one[row, :, k_from:k_to].transpose(0, 1) for one in (key, value))
        shares = scores_of(q, k, given["scale"], hidden).softmax(-1)
        v = v.repeat_interleave(q.size(1) // v.size(1), 1)
        found = torch.einsum("nqk,knd->nqd", shares, v.float())
        context[row, :, q_from:q_to] = found.to(query.dtype)
    return context, query.new_empty(1, dtype=torch.float32)


def _hidden_from_one(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Returns which slots are hidden from the one query of each row, [b, 1, keys]."""
    require(mask.dtype in (torch.bool, torch.uint8), "atten_mask is neither bool nor uint8")
    require(mask.is_contiguous(), "atten_mask is not contiguous")
    shape = (query.size(0), 1, 1, key.size(2))
    require(
        tuple(mask.shape) == shape, f"atten_mask has the shape {tuple(mask.shape)}, not {shape}"
    )
    return mask[:, 0].bool()


def _valid(
    size: int, lengths: Sequence[int] | None, padding: Tensor | None, row: int
) -> tuple[int, int]:
    """Returns where a row begins and ends: right-padded, unless the padding at its end is given."""
    length = size if lengths is None else int(lengths[row if len(lengths) > 1 else 0])
    require(0 <= length <= size, f"a length of {length} in {size}")
    if padding is None or lengths is None:
        return 0, length
    require(padding.dtype == torch.int64, "padding sizes are int64")
    end = size - max(int(padding), 0)
    require(end - length >= 0, "a row begins before its tensor")
    return end - length, end
