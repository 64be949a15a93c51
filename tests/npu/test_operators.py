"""Each fused operator, forward and backward, against the plain torch that defines it.

Tolerances: fp32 sums in another order, 1e-5 of numbers around 1; 16 bits carry 8 or 11 binary
digits, and the two sides round at different places, so 2 % or 0.4 % of numbers around 1. A wrong
scale, mask, or pair of heads is wrong by more than 0.1 in both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

from glm3cli.device.kernels import Kernels
from glm3cli.model.quantized import quantize
from tests.support.mc2 import block
from tests.support.npu.operators import KERNELS
from tests.support.ranks import RankPool

pytestmark = pytest.mark.dist

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}
S, B, HEADS, GROUPS, WIDTH = 10, 3, 4, 2, 8
SCALE = 0.4
Case = Callable[[Kernels, torch.dtype], tuple[list[torch.Tensor], torch.Tensor]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


@case
def rms_norm(kernels: Kernels, dtype: torch.dtype) -> Any:
    hidden, weight = leaf(S, B, 16, dtype=dtype), leaf(16, dtype=dtype)
    return [hidden, weight], kernels.rms_norm(hidden, weight, 0.1)


@case
def swiglu(kernels: Kernels, dtype: torch.dtype) -> Any:
    values = leaf(S, B, 16, dtype=dtype)
    return [values], kernels.swiglu(values)


def rotated(kernels: Kernels, dtype: torch.dtype, rows: int, length: int = S) -> Any:
    positions = torch.arange(length * rows).view(length, rows, 1, 1) % 7
    angles = positions * torch.tensor([1.0, 0.3])
    heads = leaf(length, B, HEADS, WIDTH, dtype=dtype)
    return [heads], kernels.rotate(heads, kernels.rotation(angles, dtype))


@case
def rotation_of_all_rows_alike(kernels: Kernels, dtype: torch.dtype) -> Any:
    return rotated(kernels, dtype, rows=1)


@case
def rotation_of_each_row(kernels: Kernels, dtype: torch.dtype) -> Any:
    return rotated(kernels, dtype, rows=B)


@case
def rotation_of_one_position(kernels: Kernels, dtype: torch.dtype) -> Any:
    return rotated(kernels, dtype, rows=B, length=1)


def attended(kernels: Kernels, dtype: torch.dtype, numbers: Any, batch: int = B) -> Any:
    query = leaf(S, batch, HEADS, WIDTH, dtype=dtype)
    # As linear layers give them: a part of each group's row.
    pair = leaf(S, batch, GROUPS, 2 * WIDTH, dtype=dtype)
    key, value = pair.split(WIDTH, dim=-1)
    return [query, pair], kernels.attention(query, key, value, SCALE, numbers)


@case
def attention(kernels: Kernels, dtype: torch.dtype) -> Any:
    return attended(kernels, dtype, None)


@case
def attention_of_one_row(kernels: Kernels, dtype: torch.dtype) -> Any:
    return attended(kernels, dtype, None, batch=1)


@case
def attention_within_samples(kernels: Kernels, dtype: torch.dtype) -> Any:
    numbers = torch.tensor(
        [[1] * 4 + [2] * 6, [1] * 10, [1] * 3 + [2] * 3 + [3] * 2 + [0] * 2]  # 0: padding
    )
    return attended(kernels, dtype, numbers)


@case
def rotation_in_place(kernels: Kernels, dtype: torch.dtype) -> Any:
    angles = torch.arange(S).unsqueeze(1) * torch.tensor([1.0, 0.3])
    whole = leaf(S, GROUPS, 4, WIDTH, dtype=dtype)
    heads = whole * 1  # a leaf can't be changed in place
    with torch.no_grad():
        kernels.turn(heads[:, :, :-1], kernels.turns(angles, dtype))
    return [whole], heads


@case
def cross_entropy(kernels: Kernels, dtype: torch.dtype) -> Any:
    logits = leaf(S, B, 20, dtype=dtype)
    labels = torch.arange(S * B).view(S, B) % 20
    return [logits], kernels.cross_entropy(logits, labels)


def run(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns a case's result and gradients, by the kernels of this process's device."""
    from glm3cli.device import require_active

    leaves, result = CASES[name](require_active().kernels, dtype)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(7))
    (result * weights.to(result.dtype)).sum().backward()
    return [result.detach(), *(one.grad for one in leaves if one.grad is not None)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_plain_torch(
    npu_ranks: RankPool, name: str, dtype: torch.dtype
) -> None:
    [found] = npu_ranks.run(1, run, name, dtype)
    expected = run(name, dtype)
    assert len(found) == len(expected)
    for ours, plain in zip(found, expected, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, **TOLERANCE[dtype])


# How many slots the query of each row sees; or the first slot of one row's queries, and how many.
PASSES: dict[str, list[int] | tuple[int, int]] = {
    "one token of each row": [6, 6, 6],
    "one token of rows of different lengths": [9, 1, 5],
    "one token of rows in a graph": [7, 16, 2],
    "a whole prompt": (0, 6),
    "several tokens more": (6, 4),
    "one token of a prompt": (6, 1),
}


def decode(name: str, dtype: torch.dtype) -> torch.Tensor:
    from glm3cli.device import require_active

    kernels, way = require_active().kernels, PASSES[name]
    rows = len(way) if isinstance(way, list) else 1
    with torch.no_grad():
        keys, values = leaf(2, rows, GROUPS, 16, WIDTH, dtype=dtype)
        if isinstance(way, list):
            query = leaf(rows, GROUPS, HEADS // GROUPS, WIDTH, dtype=dtype)
            if name.endswith("in a graph"):
                ends = torch.tensor(way, device=query.device)
                seen = kernels.seen_until(ends, max(way), keys.size(2), dtype)
            else:
                seen = kernels.seen(way, dtype, query.device)
            return kernels.attend_one(query, keys, values, SCALE, seen)
        start, length = way
        query = leaf(length, HEADS, WIDTH, dtype=dtype)
        return kernels.attend_chunk(query, keys[0], values[0], SCALE, start)


# Bits, outputs and inputs of a weight, and whether there is a bias.
FEW_BITS: dict[str, tuple[int, int, int, bool]] = {
    "8 bits": (8, 24, 40, True),
    "4 bits in groups": (4, 24, 96, True),
    "4 bits in one group": (4, 16, 64, False),
    "4 bits of outputs that fill no whole number": (4, 20, 96, True),
}


def multiply(name: str, dtype: torch.dtype) -> torch.Tensor:
    """Multiplies by a weight of few bits; plain torch does it if this process has the CPU."""
    from glm3cli.device import require_active

    device = require_active()
    kernels = Kernels() if device.name == "cpu" else device.kernels
    bits, outputs, inputs, has_bias = FEW_BITS[name]
    with torch.no_grad():
        # Small enough that a product's roundings are those of numbers around 1.
        weight = quantize(leaf(outputs, inputs, dtype=torch.float32) / inputs**0.5, bits)
        assert weight.bits == bits
        bias = leaf(outputs, dtype=dtype) if has_bias else None
        packed = kernels.pack_quantized(weight, dtype)
        return kernels.linear_quantized(leaf(5, inputs, dtype=dtype), packed, bias)


# All that inference computes, each for a type.
INFERENCE: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    **{name: partial(decode, name) for name in PASSES},
    **{name: partial(multiply, name) for name in FEW_BITS},
}


def infer(name: str, dtype: torch.dtype) -> torch.Tensor:
    return INFERENCE[name](dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", INFERENCE)
def test_inference_is_that_of_plain_torch(
    npu_ranks: RankPool, name: str, dtype: torch.dtype
) -> None:
    [found] = npu_ranks.run(1, infer, name, dtype)
    expected = infer(name, dtype)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


def multiply_in_parts(kernels: Kernels, put: Callable[..., Any] = id) -> torch.Tensor:
    """Multiplies by a weight of more outputs than one call takes."""
    whole = leaf(100, 40, dtype=torch.float32)
    hidden, bias = (leaf(*shape, dtype=torch.float16) for shape in ((3, 40), (100,)))
    for one in (whole, hidden, bias):
        put(one)
    weight = quantize(whole, 8)
    with torch.no_grad():
        packed = kernels.pack_quantized(weight, hidden.dtype)
        return kernels.linear_quantized(hidden, packed, bias)


def multiply_in_parts_on_card() -> tuple[torch.Tensor, int]:
    """Returns the product, and the number of calls."""
    from glm3cli.device import require_active
    from glm3cli.device.npu import few_bits

    device: Any = require_active()
    with patch.object(few_bits, "_MOST", 48), device.card.counting() as (launches, _):
        found = multiply_in_parts(device.kernels, device.card.put)
        return found, launches["npu_weight_quant_batchmatmul"]


def test_outputs_that_are_more_than_one_call_takes(npu_ranks: RankPool) -> None:
    [(found, calls)] = npu_ranks.run(1, multiply_in_parts_on_card)
    assert calls == 3
    # Each of the operator's scales is rounded to fp16, and plain torch's each product by it.
    torch.testing.assert_close(found, multiply_in_parts(Kernels()), rtol=2e-3, atol=2e-2)


def many(kernels: Kernels, case: str, put: Callable[..., Any] = id) -> list[torch.Tensor]:
    """Returns results and gradients beyond what one call of an operator takes.

    Args:
        kernels: The kernels.
        case: What there is more of.
        put: Puts a tensor on a card.
    """
    dtype = torch.float32
    if case == "rows x heads":
        angles = torch.arange(4.0).view(4, 1, 1, 1) * torch.ones(2)
        leaves = [leaf(4, 32, 32, WIDTH, dtype=dtype)]
        for one in (angles, *leaves):
            put(one)
        result = kernels.rotate(leaves[0], kernels.rotation(angles, dtype))
    else:
        length, each = (1100, 1) if case == "samples" else (40, 7)
        numbers = torch.arange(length).unsqueeze(0) // each + 1
        leaves = [leaf(length, 1, heads, WIDTH, dtype=dtype) for heads in (2, 1, 1)]
        for one in leaves:
            put(one)
        result = kernels.attention(*leaves, SCALE, numbers)
    result.square().sum().backward()
    return [result.detach(), *(one.grad for one in leaves if one.grad is not None)]


def many_on_card(case: str) -> tuple[list[torch.Tensor], int]:
    """Returns the results, and the number of calls of attention."""
    from glm3cli.device import require_active
    from glm3cli.device.npu import packed
    from tests.support.npu.operators import attention

    device: Any = require_active()
    limits = packed._MOST_TOKENS, attention.MOST_TOKENS
    if case == "tokens":  # a million take too long here
        packed._MOST_TOKENS = attention.MOST_TOKENS = 16
    try:
        with device.card.counting() as (launches, _):
            return many(device.kernels, case, device.card.put), launches["npu_fusion_attention"]
    finally:
        packed._MOST_TOKENS, attention.MOST_TOKENS = limits


@pytest.mark.parametrize(
    ("case", "calls"),
    [pytest.param("samples", 2, marks=pytest.mark.slow), ("tokens", 3), ("rows x heads", 0)],
)
def test_what_is_more_than_one_call_takes(npu_ranks: RankPool, case: str, calls: int) -> None:
    [(found, count)] = npu_ranks.run(1, many_on_card, case)
    assert count == calls
    for ours, plain in zip(found, many(Kernels(), case), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)  # gradients of squares


MC2 = {"npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"}


def count_calls(dtype: torch.dtype) -> set[str]:
    """Returns the operators that all cases call, but for those of several ranks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
            if function.namespace == "npu":
                called.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Recorder():
        for name in CASES:
            run(name, dtype)
        for name in INFERENCE:
            infer(name, dtype)
    return called


def test_every_emulated_operator_is_called(npu_ranks: RankPool) -> None:
    [called] = npu_ranks.run(1, count_calls, torch.bfloat16)
    assert called == set(KERNELS) - MC2


OPERATORS = {
    "rms-norm": {"npu_rms_norm", "npu_rms_norm_backward"},
    "swiglu": {"npu_swiglu", "npu_swiglu_backward"},
    "rotary": {"npu_rotary_mul"},
    "attention": {"npu_fusion_attention", "npu_fusion_attention_grad"},
    "decode-attention": {"npu_fused_infer_attention_score"},
    "cross-entropy": {"npu_cross_entropy_loss", "npu_cross_entropy_loss_backward"},
    "quantized-linear": {"npu_weight_quant_batchmatmul", "npu_convert_weight_to_int4pack"},
}


def left_out(name: Any, dtype: torch.dtype) -> tuple[set[str], list[list[torch.Tensor]]]:
    """Returns the operators that are called without one, and all results."""
    from glm3cli.device import require_active

    device = require_active()
    device.leave_out([name])
    try:
        called = count_calls(dtype)
        results = [run(case, dtype) for case in CASES]
        return called, [*results, *([infer(one, dtype)] for one in INFERENCE)]
    finally:
        device.leave_out([])


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_left_out_is_plain_torch(npu_ranks: RankPool, name: str) -> None:
    [(called, found)] = npu_ranks.run(1, left_out, name, torch.bfloat16)
    assert called == set(KERNELS) - MC2 - OPERATORS[name]
    expected = [run(case, torch.bfloat16) for case in CASES]
    expected += [[infer(one, torch.bfloat16)] for one in INFERENCE]
    for ours, plain in zip(found, expected, strict=True):
        for one, other in zip(ours, plain, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, **TOLERANCE[torch.bfloat16])


def _of_few_bits(weight: torch.Tensor, x: torch.Tensor, *args: Any, **named: Any) -> Any:
    return torch.ops.npu.npu_weight_quant_batchmatmul(x, weight, *args, **named)


def refusals() -> dict[str, str]:
    """Returns the errors of the real schemas for calls that a card would refuse, too."""
    npu = torch.ops.npu
    heads = torch.randn(4, 2, 3, 8)
    angles = torch.randn(4, 1, 1, 8)
    half = torch.ones(3, 64).half()
    of_few_bits = partial(_of_few_bits, torch.zeros(64, 8, dtype=torch.int8))
    attempts: dict[str, Callable[[], Any]] = {
        "unknown argument": lambda: npu.npu_rms_norm(heads, torch.ones(8), eps=1e-5),
        "missing argument": lambda: npu.npu_rotary_mul(heads, angles),
        "wrong kind": lambda: npu.npu_swiglu(heads, dim="last"),
        "other type": lambda: npu.npu_rms_norm(heads, torch.ones(8).bfloat16()),
        "angles of rows": lambda: npu.npu_rotary_mul(
            heads, angles.expand(4, 2, 1, 8), angles.expand(4, 2, 1, 8), rotary_mode="interleave"
        ),
        "fp32 decoding": lambda: npu.npu_fused_infer_attention_score(
            heads, heads, heads, input_layout="BNSD", num_heads=2
        ),
        "fp32 with few bits": lambda: of_few_bits(torch.ones(3, 64), torch.ones(1, 8)),
        "groups of 16": lambda: of_few_bits(half, half.new_ones(4, 8), antiquant_group_size=16),
        "a group of all": lambda: of_few_bits(half, half.new_ones(1, 8), antiquant_group_size=64),
        "bias of bf16": lambda: of_few_bits(
            half.bfloat16(), torch.ones(1, 8).bfloat16(), bias=torch.ones(8).bfloat16()
        ),
        "a row too long": lambda: of_few_bits(half[:2].t(), half.new_ones(1, 8)),
        "more than 4 bits": lambda: npu.npu_convert_weight_to_int4pack(torch.full((8, 8), 8).int()),
        "turned before it is packed": lambda: npu.npu_convert_weight_to_int4pack(
            torch.zeros(8, 16).int().t()
        ),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except RuntimeError as error:
            said[name] = str(error)
    return said


def test_what_a_card_refuses_is_refused(npu_ranks: RankPool) -> None:
    [said] = npu_ranks.run(1, refusals)
    expected = {
        "unknown argument": "Unknown keyword argument 'eps'",
        "missing argument": "missing value for argument 'r2'",
        "wrong kind": "Expected a value of type 'int' for argument 'dim'",
        "other type": "gamma has another type",
        "angles of rows": "interleave takes 11SD, 1S1D, or S11D",
        "fp32 decoding": "no torch.float32",
        "fp32 with few bits": "no torch.float32",
        "groups of 16": "no multiple of 32",
        "a group of all": "no multiple of 32 in [32, k - 1]",
        "bias of bf16": "bias isn't torch.float32",
        "a row too long": "the k of x and weight should be equal",
        "more than 4 bits": "not of 4 bits",
        "turned before it is packed": "not contiguous",
    }
    assert said.keys() == expected.keys()
    for name, text in expected.items():
        assert text in said[name]


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_layers_that_send_while_they_multiply(
    ranks: RankPool, npu_ranks: RankPool, device: str
) -> None:
    """The tolerance is bf16's: sums over two ranks are rounded at different places."""
    expected = ranks.run(2, block, False)
    found = (ranks if device == "cpu" else npu_ranks).run(2, block, True)
    for ours, plain in zip(found, expected, strict=True):
        assert len(ours) == len(plain) == 5
        for one, other in zip(ours, plain, strict=True):
            assert one.shape == other.shape
            size = other.float().norm()
            assert (one.float() - other.float()).norm() < 1e-2 * size
