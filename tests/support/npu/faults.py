"""Faults that an operator, a collective, a cache or a checkpoint might have, put in on purpose.

Each entry of the tables puts one fault into this process for as long as a block lasts.
"""

import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

Fault = Callable[[], Any]  # makes a context manager
Wrong = Callable[..., Any]  # is called with the real function, and then with its arguments


def replaced(place: str, wrong: Wrong) -> Fault:
    """Replaces a function or method, such as `torch.distributed:all_reduce`."""

    def put() -> Any:
        module, _, inner = place.partition(":")
        path, _, name = inner.rpartition(".")
        owner = pkgutil.resolve_name(f"{module}:{path}")
        real = getattr(owner, name)
        return patch.object(owner, name, Replacement(real, wrong))

    return put


class Replacement:
    """A function that calls another with a real one, for which it stands in all else."""

    def __init__(self, real: Any, wrong: Wrong) -> None:
        self._real, self._wrong = real, wrong

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._wrong(self._real, *args, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __get__(self, owner: Any, _type: Any = None) -> Any:
        return self if owner is None else partial(self, owner)


def operator(name: str, wrong: Wrong) -> Fault:
    """Replaces an operator of torch_npu."""
    return replaced(f"torch:ops.npu.{name}", wrong)


def with_(**changes: Any) -> Wrong:
    """Calls the real function with other named arguments."""
    return lambda real, *args, **named: real(*args, **{**named, **changes})


def changing(number: int, change: Callable[[Any], Any]) -> Wrong:
    """Changes one of the results of the real function."""

    def wrong(real: Any, *args: Any, **named: Any) -> Any:
        results = list(real(*args, **named))
        results[number] = change(results[number])
        return tuple(results)

    return wrong


def _swapped(values: Tensor) -> Tensor:
    return torch.cat(values.chunk(2, -1)[::-1], -1)


def _one_later(real: Any, query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Any:
    """Attention in which a query sees the position after its own instead of the first."""
    return real(query, key.roll(-1, 0), value.roll(-1, 0), **named)


def _beyond_the_mask(real: Any, *args: Any, **named: Any) -> Any:
    """Attention that repeats the first positions where a compressed mask has no more rows."""
    context, *rest = real(*args, **named)
    if named["input_layout"] == "SBH" and len(context) > 2048:
        context = torch.cat([context[:2048], context[: len(context) - 2048]])
    return (context, *rest)


def _whole_pack(real: Any, *args: Any, **named: Any) -> Any:
    """Attention that takes a pack for one sample."""
    if named.get("actual_seq_qlen") is not None:
        ends = named["actual_seq_qlen"][-1:]
        named = {**named, "actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    return real(*args, **named)


def _first_ends(real: Any, *args: Any, **named: Any) -> Any:
    """Attention that has room for 1,024 ends, and takes the rest for one sample."""
    ends = named.get("actual_seq_qlen")
    if ends is not None and len(ends) > 1000:
        ends = [*ends[:1000], ends[-1]]
        named = {**named, "actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    return real(*args, **named)


def _nan_in_padding(real: Any, *args: Any, **named: Any) -> Any:
    """Attention that gives NaN for the short samples of packs, as rows of padding may."""
    context, *rest = real(*args, **named)
    if named.get("actual_seq_qlen") is not None:
        context[-1] = torch.nan
    return (context, *rest)


def _other_groups(real: Any, query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Any:
    """Attention whose heads take the groups in turn, instead of each group's heads together."""
    if key.dim() == 3 and key.size(-1) > 128 and named["input_layout"] == "SBH":
        key, value = (_swapped(one).contiguous() for one in (key, value))
    return real(query, key, value, **named)


def _in_bf16(real: Any, logits: Tensor, *args: Any, **named: Any) -> Any:
    return real(logits.bfloat16().float(), *args, **named)


def _first_group_for_all(real: Any, hidden: Tensor, weight: Tensor, scales: Tensor, **named: Any):
    """A product in which all groups of inputs have the scales of the first."""
    return real(hidden, weight, scales[:1].expand_as(scales).contiguous(), **named)


def _turned_around(real: Any, numbers: Tensor) -> Tensor:
    """Packs eight numbers of 4 bits from the other end."""
    return real(numbers.unflatten(1, (-1, 8)).flip(-1).flatten(1).contiguous())


def _prompt_from_the_start(real: Any, *args: Any, **named: Any) -> Any:
    """A mask whose diagonal begins in the upper left corner, also where a text goes on."""
    return real(*args, **{**named, "sparse_mode": 2 if "sparse_mode" in named else 0})


# Faults that only long sequences show.
LONG = {"attention that is wrong beyond 2,048 positions", "attention with room for 1,000 samples"}
# With the subject of the checks that are to find it.
OPERATORS: dict[str, tuple[str, Fault]] = {
    "a norm without its epsilon": ("RMSNorm", operator("npu_rms_norm", with_(epsilon=0.0))),
    "a norm without its weight": (
        "RMSNorm",
        operator(
            "npu_rms_norm",
            lambda real, hidden, weight, **named: real(hidden, torch.ones_like(weight), **named),
        ),
    ),
    "a norm's gradient that is 3 % too large": (
        "RMSNorm",
        operator("npu_rms_norm_backward", changing(0, lambda grad: grad * 1.03)),
    ),
    "a norm's weight gradient of half the rows": (
        "RMSNorm",
        operator(
            "npu_rms_norm_backward",
            lambda real, grad, hidden, weight, inverse: (
                real(grad, hidden, weight, inverse)[0],
                real(grad[:12], hidden[:12], weight, inverse[:12])[1],
            ),
        ),
    ),
    "gate and up side by side the wrong way": (
        "SwiGLU",
        operator("npu_swiglu", lambda real, values: real(_swapped(values))),
    ),
    "a SwiGLU's gradient with its halves swapped": (
        "SwiGLU",
        operator("npu_swiglu_backward", lambda real, *args: _swapped(real(*args))),
    ),
    "a rotation of halves instead of pairs": (
        "rotary positions",
        operator("npu_rotary_mul", with_(rotary_mode="half")),
    ),
    "a rotation to the other side": (
        "rotary positions",
        operator(
            "npu_rotary_mul",
            lambda real, heads, cosines, sines, **named: real(heads, cosines, -sines, **named),
        ),
    ),
    "attention without a mask": (
        "attention",
        operator("npu_fusion_attention", with_(atten_mask=None, sparse_mode=0)),
    ),
    "attention to the next position": ("attention", operator("npu_fusion_attention", _one_later)),
    "attention that is wrong beyond 2,048 positions": (
        "attention",
        operator("npu_fusion_attention", _beyond_the_mask),
    ),
    "attention with another scale": (
        "attention",
        operator(
            "npu_fusion_attention",
            lambda real, *args, **named: real(*args, **{**named, "scale": named["scale"] * 1.1}),
        ),
    ),
    "attention through whole packs": (
        "attention within samples",
        operator("npu_fusion_attention", _whole_pack),
    ),
    "attention with room for 1,000 samples": (
        "attention within samples",
        operator("npu_fusion_attention", _first_ends),
    ),
    "attention that is NaN at the end of packs": (
        "attention within samples",
        operator("npu_fusion_attention", _nan_in_padding),
    ),
    "attention of heads to each other's groups": (
        "attention",
        operator("npu_fusion_attention", _other_groups),
    ),
    "attention's gradients without a mask": (
        "attention",
        operator("npu_fusion_attention_grad", with_(atten_mask=None, sparse_mode=0)),
    ),
    "attention's gradients of keys 5 % too small": (
        "attention",
        operator("npu_fusion_attention_grad", changing(1, lambda grad: grad * 0.95)),
    ),
    "attention's gradients of values as those of keys": (
        "attention",
        operator(
            "npu_fusion_attention_grad",
            lambda real, *args, **named: [real(*args, **named)[i] for i in (0, 1, 1)],
        ),
    ),
    "a cross-entropy of bf16": ("cross-entropy", operator("npu_cross_entropy_loss", _in_bf16)),
    "a cross-entropy's gradient without the label": (
        "cross-entropy",
        operator(
            "npu_cross_entropy_loss_backward",
            lambda real, grads, log_probabilities, *args, **named: (
                log_probabilities.exp() * grads.unsqueeze(-1)
            ),
        ),
    ),
    "decoding that sees slots of nobody": (
        "attention of a new token",
        operator(
            "npu_fused_infer_attention_score",
            lambda real, query, keys, values, **named: real(
                query,
                keys,
                values,
                **{**named, "actual_seq_lengths_kv": [keys.size(2)] * keys.size(0)},
            ),
        ),
    ),
    "a mask that is ignored in graphs": (
        "attention of a new token",
        operator(
            "npu_fused_infer_attention_score",
            lambda real, query, *args, **named: real(
                query, *args, **named | ({} if query.size(2) > 1 else {"atten_mask": None})
            ),
        ),
    ),
    "a prompt that goes on, masked from its start": (
        "attention of a prompt",
        operator("npu_fused_infer_attention_score", _prompt_from_the_start),
    ),
    "the longest row's length for all": (
        "attention of a new token",
        replaced(
            "tests.support.npu.emulation:EmulatedKernels.seen",
            lambda real, kernels, ends, *args: real(kernels, [max(ends)] * len(ends), *args),
        ),
    ),
    "few bits in groups that share a scale": (
        "linear layer of few bits",
        operator("npu_weight_quant_batchmatmul", _first_group_for_all),
    ),
    "few bits without what zero stands for": (
        "linear layer of few bits",
        operator("npu_weight_quant_batchmatmul", with_(antiquant_offset=None)),
    ),
    "4 bits in the other order": (
        "linear layer of few bits",
        operator("npu_convert_weight_to_int4pack", _turned_around),
    ),
    "few bits without a bias": (
        "linear layer of few bits",
        operator("npu_weight_quant_batchmatmul", with_(bias=None)),
    ),
}


def _saturating(real: Any, *args: Any) -> Tensor:
    result = real(*args)
    return result.clamp(-65504, 65504) if result.dtype == torch.float16 else result


TRAPS: dict[str, Fault] = {
    "a sum that stops at the largest number of fp16": replaced("torch:Tensor.__add__", _saturating),
    "a matrix product that does": replaced("torch:Tensor.__matmul__", _saturating),
    "a norm that passes over NaN": replaced(
        "torch:Tensor.norm", lambda real, one: real(one.nan_to_num())
    ),
    "a sort of 16 bits": replaced(
        "torch:Tensor.sort", lambda real, one, **named: real(one.bfloat16(), **named)
    ),
}


def _of_own_numbers(real: Any, ours: Tensor, *args: Any, **named: Any) -> Any:
    """A sum from which the last rank's numbers are missing."""
    if dist.get_rank() == dist.get_world_size() - 1:
        sent = torch.zeros_like(ours)
        real(sent, *args, **named)
        return ours.copy_(sent)
    return real(ours, *args, **named)


def _through_bf16(real: Any, ours: Tensor, *args: Any, **named: Any) -> Any:
    if ours.dtype != torch.float32:
        return real(ours, *args, **named)
    sent = ours.bfloat16()
    real(sent, *args, **named)
    return ours.copy_(sent)


def _reversed(real: Any, ours: Tensor, sent: Tensor, *args: Any, **named: Any) -> Any:
    real(ours, sent, *args, **named)
    ours.copy_(ours.view(-1, sent.numel()).flip(0).flatten())


def _short(real: Any, operations: Any) -> Any:
    """An exchange whose large messages lose their last element."""
    for work in real(operations):
        work.wait()
    for one in operations:
        if one.op is dist.irecv and one.tensor.numel() > 1000:
            one.tensor[-1] = 0
    return []  # gloo waits forever for what was waited for


COLLECTIVES: dict[str, Fault] = {
    "a sum without a rank": replaced("torch.distributed:all_reduce", _of_own_numbers),
    "a sum of fp32 in bf16": replaced("torch.distributed:all_reduce", _through_bf16),
    "a gathering in another order": replaced("torch.distributed:all_gather_into_tensor", _reversed),
    "a scattering of the first rank's part to all": replaced(
        "torch.distributed:reduce_scatter_tensor",
        lambda real, ours, sent, **named: real(
            ours, sent.view(2, -1).flip(0).flatten().contiguous(), **named
        ),
    ),
    "an exchange that leaves everything where it is": replaced(
        "torch.distributed:all_to_all_single",
        lambda _real, ours, sent, **_named: ours.copy_(sent),
    ),
    "a broadcast from another rank": replaced(
        "torch.distributed:broadcast",
        lambda real, ours, source, **named: real(ours, 1 - source, **named),
    ),
    "messages that lose their end": replaced("torch.distributed:batch_isend_irecv", _short),
    "a receipt of what was there": replaced(
        "torch.distributed:recv",
        lambda real, ours, *args, **named: real(torch.empty_like(ours), *args, **named),
    ),
}


def _stale(real: Any, *args: Any, **named: Any) -> Any:
    """Remembers its first result, whatever it is asked for."""
    if not hasattr(_stale, "kept"):
        _stale.kept = real(*args, **named)  # type: ignore[attr-defined]
    return _stale.kept  # type: ignore[attr-defined]


def _elsewhere(real: Any, cache: Any, layer: int, rows: Any, slots: Any, new: Tensor) -> Any:
    return real(cache, layer, rows, slots - 1, new)


def _some_bits(real: Any, *args: Any, **named: Any) -> Any:
    """A restored checkpoint in which one weight has another last bit."""
    result = real(*args, **named)
    with torch.no_grad():
        parameter = next(args[1][0].parameters())
        parameter.view(torch.int32).flatten()[0] ^= 1
    return result


def _lost_moments(real: Any, *args: Any, **named: Any) -> Any:
    """A restored checkpoint whose optimizer begins anew."""
    result = real(*args, **named)
    for part in args[2].chained_optimizers:
        for state in part.optimizer.state.values():
            state["exp_avg"].zero_()
    return result


_HERE = "glm3cli.numerics.small_model"
MODELS: dict[str, Fault] = {
    "a key in the slot of the token before": replaced(
        "glm3cli.model.cache:KVCache.write_one", _elsewhere
    ),
    "the angles of the first pass in all later ones": replaced(
        "glm3cli.model.decoder:angles_at", _stale
    ),
    "a checkpoint with another bit": replaced(f"{_HERE}:load_training", _some_bits),
    "a checkpoint without the optimizer's moments": replaced(
        f"{_HERE}:load_training", _lost_moments
    ),
    "an optimizer without weight decay": replaced(
        "glm3cli.train.setup:OptimizerParamScheduler.get_wd", lambda *_args: 0.0
    ),
    "gradients that aren't clipped": replaced(
        "glm3cli.train.setup:OptimizerConfig", with_(clip_grad=0.0)
    ),
}
