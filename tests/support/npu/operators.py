"""CPU kernels for the operators of torch_npu that we call, written from its documentation.

Each kernel refuses what the operator on a card would refuse (torch_npu/_op_plugin_docs.py). It
computes in small steps and shares no code with the kernels that it is compared with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

KERNELS: dict[str, Callable[..., Any]] = {}
MOST_SAMPLES, MOST_TOKENS = 1024, 2**20
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    KERNELS[function.__name__] = function
    return function


def with_defaults(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `function` so that it gets every argument of the operator's schema by position.

    The dispatcher leaves out trailing arguments that have their default, and passes those after a
    star by name.
    """
    schema = getattr(torch.ops.npu, name).default._schema

    def call(*given: Any, **named: Any) -> Any:
        rest = schema.arguments[len(given) :]
        return function(*given, *(named.get(one.name, one.default_value) for one in rest))

    return call


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


# --- norm, activation, rotation, loss ---


@kernel
def npu_rms_norm(hidden: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    require(hidden.dtype in FLOATS, f"npu_rms_norm: no {hidden.dtype}")
    require(gamma.dtype == hidden.dtype, "npu_rms_norm: gamma has another type than the input")
    require(gamma.shape == hidden.shape[-1:], "npu_rms_norm: gamma has another size")
    rstd = (hidden.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (hidden.float() * rstd * gamma.float()).to(hidden.dtype), rstd


@kernel
def npu_rms_norm_backward(
    dy: Tensor, hidden: Tensor, gamma: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    require(dy.dtype == hidden.dtype == gamma.dtype, "npu_rms_norm_backward: types differ")
    require(rstd.dtype == torch.float32, "npu_rms_norm_backward: rstd is not fp32")
    normed = hidden.float() * rstd
    of_normed = dy.float() * gamma.float()
    of_hidden = rstd * (of_normed - normed * (of_normed * normed).mean(-1, keepdim=True))
    of_gamma = (dy.float() * normed).flatten(0, -2).sum(0)
    return of_hidden.to(hidden.dtype), of_gamma


@kernel
def npu_swiglu(values: Tensor, dim: int) -> Tensor:
    require(values.dtype in FLOATS, f"npu_swiglu: no {values.dtype}")
    gate, up = values.chunk(2, dim)
    return gate * torch.sigmoid(gate) * up


@kernel
def npu_swiglu_backward(grad: Tensor, values: Tensor, dim: int) -> Tensor:
    require(grad.dtype == values.dtype, "npu_swiglu_backward: types differ")
    gate, up = values.chunk(2, dim)
    sigmoid = torch.sigmoid(gate)
    of_gate = grad * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    return torch.cat([of_gate, grad * gate * sigmoid], dim)


@kernel
def npu_rotary_mul(
    values: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate: Tensor | None = None
) -> Tensor:
    require(rotate is None, "npu_rotary_mul: rotate is not for these modes")
    require(values.dim() == r1.dim() == r2.dim() == 4, "npu_rotary_mul: not 4 dims")
    require(r1.dtype == r2.dtype == values.dtype, "npu_rotary_mul: types differ")
    require(r1.shape == r2.shape, "npu_rotary_mul: r1 and r2 differ in shape")
    require(r1.size(3) == values.size(3), "npu_rotary_mul: r1 isn't as wide as the input")
    require(values.size(3) % 2 == 0 and values.size(3) < 896, "npu_rotary_mul: D")
    if rotary_mode == "half":
        first, second = values.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        require(rotary_mode == "interleave", f"npu_rotary_mul: mode {rotary_mode}")
        along = [i for i in range(3) if r1.size(i) > 1 or values.size(i) == 1]
        position = next((i for i in range(3) if r1.size(i) > 1), along[0] if along else -1)
        require(
            position >= 0 and r1.size(position) == values.size(position),
            "npu_rotary_mul: interleave takes 11SD, 1S1D, or S11D",
        )
        others = [i for i in range(3) if i != position]
        require(
            all(r1.size(i) == 1 for i in others),
            "npu_rotary_mul: interleave takes 11SD, 1S1D, or S11D",
        )
        require(
            values.size(others[0]) * values.size(others[1]) < 1000, "npu_rotary_mul: B * N >= 1000"
        )
        turned = torch.stack([-values[..., 1::2], values[..., ::2]], -1).flatten(-2)
    return values * r1 + turned * r2


@kernel
def npu_cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale_for_zloss: float,
    return_zloss: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require(logits.dim() == 2 and target.dim() == 1, "npu_cross_entropy_loss: not [N, C] and [N]")
    require(logits.dtype in FLOATS, f"npu_cross_entropy_loss: no {logits.dtype}")
    require(target.dtype == torch.int64, "npu_cross_entropy_loss: target is not int64")
    require(logits.size(0) <= 200_000, "npu_cross_entropy_loss: N > 200,000")
    require(label_smoothing == lse_square_scale_for_zloss == 0 and not return_zloss, "no zloss")
    shifted = logits - logits.max(-1, keepdim=True).values
    log_prob = shifted - shifted.exp().sum(-1, keepdim=True).log()
    losses = -log_prob[torch.arange(len(target)), target]
    reduced = {"none": losses, "sum": losses.sum()[None], "mean": losses.mean()[None]}[reduction]
    empty = logits.new_empty(0)
    return reduced, log_prob, empty, empty.clone()


@kernel
def npu_cross_entropy_loss_backward(
    grad_loss: Tensor,
    log_prob: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_zloss: Tensor | None,
    lse_for_zloss: Tensor | None,
    reduction: str,
    *_options: Any,
) -> Tensor:
    require(grad_loss.dtype == log_prob.dtype, "npu_cross_entropy_loss_backward: types differ")
    require(target.dtype == torch.int64, "npu_cross_entropy_loss_backward: target is not int64")
    shares = log_prob.exp()
    shares[torch.arange(len(target)), target] -= 1
    if reduction == "none":
        require(grad_loss.shape == target.shape, "npu_cross_entropy_loss_backward: grad_loss")
        return shares * grad_loss[:, None]
    return shares * grad_loss / (len(target) if reduction == "mean" else 1)


# --- matrix products that send (MC2) ---


def _check_mc2(rows: Tensor, matrix: Tensor, world_size: int) -> None:
    require(rows.dtype in FLOATS[:2] and matrix.dtype == rows.dtype, f"MC2: no {rows.dtype}")
    require(rows.dim() == matrix.dim() == 2, "MC2: not two dims")
    require(256 <= rows.size(1) < 65535, "MC2: k is not in [256, 65535)")
    require(rows.size(1) == matrix.size(0), "MC2: k differs")
    require(rows.is_contiguous(), "MC2: the input is transposed")
    require(world_size in (2, 4, 8), "MC2: not 2, 4 or 8 ranks")


def _group(name: str, world_size: int) -> Any:
    group = dist.distributed_c10d._resolve_process_group(name)
    require(group.size() == world_size, "MC2: world_size is not the group's")
    return group


@kernel
def npu_all_gather_base_mm(
    rows: Tensor, matrix: Tensor, hcom: str, world_size: int, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    _check_mc2(rows, matrix, world_size)
    require(bias is None, "MC2: no bias")
    parts = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(parts, rows, group=_group(hcom, world_size))
    gathered = torch.cat(parts)
    return gathered @ matrix, gathered


@kernel
def npu_mm_reduce_scatter_base(
    rows: Tensor,
    matrix: Tensor,
    hcom: str,
    world_size: int,
    reduce_op: str,
    bias: Tensor | None,
    *others: Any,
) -> Tensor:
    _check_mc2(rows, matrix, world_size)
    require(bias is None and reduce_op == "sum", "MC2: sums without bias alone")
    require(rows.size(0) % world_size == 0, "MC2: m is not a multiple of world_size")
    group = _group(hcom, world_size)
    product = (rows @ matrix).float()
    dist.all_reduce(product, group=group)
    return product.chunk(world_size)[dist.get_rank(group)].to(rows.dtype)


# --- attention of training ---


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


def _hidden(
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


def _scores(query: Tensor, key: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
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
        hidden = _hidden(len(q), len(k), atten_mask, sparse_mode)
        scores = _scores(q, k, scale, hidden)
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
        scores = _scores(q, k, scale_value, _hidden(len(q), len(k), atten_mask, sparse_mode))
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


# --- attention of decoding ---


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
            hidden = _hidden(*lengths, mask, mode)
        q = query[row, :, q_from:q_to].transpose(0, 1)
        k, v = (one[row, :, k_from:k_to].transpose(0, 1) for one in (key, value))
        shares = _scores(q, k, given["scale"], hidden).softmax(-1)
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


# --- weights of few bits ---


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
