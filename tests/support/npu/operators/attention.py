"""Attention of training, and what that of decoding shares with it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.npu.operators.kernel import FLOATS, kernel, require

MOST_SAMPLES, MOST_TOKENS = 1024, 2**20


def _samples(
    layout: str, tensor: Tensor, head_size: int, lengths: Sequence[int] | None
) -> list[Tensor]:
    """Returns the parts that attend within themselves, [s, n, d] each."""
    if layout == "SBH":
        return list(tensor.unflatten(-1, (-1, head_size)).unbind(1))
    require(layout == "TND", f"the emulation has no layout {layout}")
    require(bool(lengths), "TND wants actual_seq_qlen and actual_seq_kvlen")
    assert lengths is not None
    require(lengths[-1] == tensor.size(0), "TND: the lengths don't sum up to T")
    require(len(lengths) <= MOST_SAMPLES, f"TND: more than {MOST_SAMPLES} samples")
    require(tensor.size(0) <= MOST_TOKENS, f"TND: T is above {MOST_TOKENS}")
    starts = [0, *lengths[:-1]]
    return [tensor[start:end] for start, end in zip(starts, lengths, strict=True)]


def _joined(layout: str, parts: list[Tensor]) -> Tensor:
    return torch.stack([p.flatten(1) for p in parts], 1) if layout == "SBH" else torch.cat(parts)


def hidden_scores(
    num_queries: int, num_keys: int, mask: Tensor | None, sparse_mode: int
) -> Tensor | None:
    """Returns which scores are hidden, [queries, keys].

    Without a mask none is, since sparse_mode has no effect then.
    """
    if mask is None:
        return None
    require(mask.dtype in (torch.bool, torch.uint8), "atten_mask is neither bool nor uint8")
    if sparse_mode == 0:
        return mask.bool().expand(num_queries, num_keys)
    require(sparse_mode in (2, 3), f"the emulation has no sparse_mode {sparse_mode}")
    require(tuple(mask.shape[-2:]) == (2048, 2048), "a compressed mask has 2048 x 2048")
    triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    require(bool((mask.bool() == triangle).all()), "the compressed mask is no triangle")
    shift = num_keys - num_queries if sparse_mode == 3 else 0
    return torch.ones(num_queries, num_keys, dtype=torch.bool).triu(1 + shift)


def scores_of(query: Tensor, key: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    """Returns scores in fp32, [n, queries, keys]; every group of keys serves several heads."""
    key = key.repeat_interleave(query.size(1) // key.size(1), 1)
    scores = torch.einsum("qnd,knd->nqk", query.float(), key.float()) * scale
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def _check_fusion(query: Tensor, key: Tensor, value: Tensor, head_num: int, layout: str) -> int:
    require(query.dtype == key.dtype == value.dtype, "query, key and value differ in type")
    require(query.dtype in FLOATS, f"npu_fusion_attention: no {query.dtype}")
    require(key.shape == value.shape, "key and value differ in shape")
    size = query.size(-1) // head_num if layout == "SBH" else query.size(-1)
    require(layout != "TND" or query.size(1) == head_num, "head_num is not the query's N")
    return size


@kernel
def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None,
    padding_mask: Tensor | None,
    atten_mask: Tensor | None,
    scale: float,
    keep_prob: float,
    pre_tockens: int,
    next_tockens: int,
    inner_precise: int,
    prefix: Sequence[int] | None,
    actual_seq_qlen: Sequence[int] | None,
    actual_seq_kvlen: Sequence[int] | None,
    sparse_mode: int,
    *_others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    size = _check_fusion(query, key, value, head_num, input_layout)
    require(pse is None and padding_mask is None and keep_prob == 1.0, "not emulated")
    queries = _samples(input_layout, query, size, actual_seq_qlen)
    keys, values = (_samples(input_layout, one, size, actual_seq_kvlen) for one in (key, value))
    contexts, largest, totals = [], [], []
    for q, k, v in zip(queries, keys, values, strict=True):
        hidden = hidden_scores(len(q), len(k), atten_mask, sparse_mode)
        scores = scores_of(q, k, scale, hidden)
        top = scores.max(-1, keepdim=True).values
        exponents = (scores - top).exp()
        total = exponents.sum(-1, keepdim=True)
        v = v.repeat_interleave(q.size(1) // v.size(1), 1)
        contexts.append(torch.einsum("nqk,knd->qnd", exponents / total, v.float()).to(q.dtype))
        largest.append(top.expand(-1, -1, 8))  # [n, s, 8]: the same number eight times
        totals.append(total.expand(-1, -1, 8))
    if input_layout == "SBH":
        statistics = [torch.stack(one).contiguous() for one in (largest, totals)]  # [b, n, s, 8]
    else:
        statistics = [torch.cat(one, 1).contiguous() for one in (largest, totals)]  # [n, t, 8]
    return _joined(input_layout, contexts), *statistics, query.new_empty(0), 0, 0, 0


@kernel
def npu_fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None,
    padding_mask: Tensor | None,
    atten_mask: Tensor | None,
    softmax_max: Tensor | None,
    softmax_sum: Tensor | None,
    softmax_in: Tensor | None,
    attention_in: Tensor | None,
    scale_value: float,
    keep_prob: float,
    pre_tockens: int,
    next_tockens: int,
    inner_precise: int,
    seed: int,
    offset: int,
    numels: int,
    prefix: Sequence[int] | None,
    actual_seq_qlen: Sequence[int] | None,
    actual_seq_kvlen: Sequence[int] | None,
    sparse_mode: int,
    *_others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = _check_fusion(query, key, value, head_num, input_layout)
    require(dy.dtype == query.dtype, "npu_fusion_attention_grad: dy has another type")
    require(dy.is_contiguous(), "npu_fusion_attention_grad: dy is not contiguous")
    if softmax_max is None or softmax_sum is None or attention_in is None:
        raise RuntimeError("npu_fusion_attention_grad wants what the forward operator gave")
    require(softmax_max.dtype == softmax_sum.dtype == torch.float32, "statistics are fp32")
    queries, grads, contexts = (
        _samples(input_layout, one, size, actual_seq_qlen) for one in (query, dy, attention_in)
    )
    keys, values = (_samples(input_layout, one, size, actual_seq_kvlen) for one in (key, value))
    if input_layout == "SBH":
        tops, totals = list(softmax_max.unbind(0)), list(softmax_sum.unbind(0))
    else:
        lengths = [len(q) for q in queries]
        tops, totals = (list(one.split(lengths, 1)) for one in (softmax_max, softmax_sum))
    results: list[list[Tensor]] = [[], [], []]
    for q, k, v, grad, context, top, total in zip(
        queries, keys, values, grads, contexts, tops, totals, strict=True
    ):
        scores = scores_of(
            q, k, scale_value, hidden_scores(len(q), len(k), atten_mask, sparse_mode)
        )
        shares = (scores - top[..., :1]).exp() / total[..., :1]
        grad, copies = grad.float(), q.size(1) // k.size(1)
        of_value = torch.einsum("nqk,qnd->knd", shares, grad)
        wide = v.float().repeat_interleave(copies, 1)
        of_shares = torch.einsum("qnd,knd->nqk", grad, wide)
        mean = (grad * context.float()).sum(-1).T.unsqueeze(-1)  # [n, q, 1]
        of_scores = shares * (of_shares - mean) * scale_value
        wide = k.float().repeat_interleave(copies, 1)
        of_query = torch.einsum("nqk,knd->qnd", of_scores, wide)
        of_key = torch.einsum("nqk,qnd->knd", of_scores, q.float())
        for place, one in zip(results, (of_query, of_key, of_value), strict=True):
            if one is not of_query:
                one = one.unflatten(1, (-1, copies)).sum(2)
            place.append(one.to(q.dtype))
    of_query, of_key, of_value = (_joined(input_layout, one) for one in results)
    return of_query, of_key, of_value, query.new_empty(0), query.new_empty(0)
