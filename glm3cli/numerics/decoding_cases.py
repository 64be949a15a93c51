"""The operations of generation at the shapes of ChatGLM3-6B.

The slots of a KV cache that a query may not see hold large numbers, as the slots of texts that have
ended do.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glm3cli.device.dtypes import Quantized
from glm3cli.model.quantized import quantize
from glm3cli.model.rotary import angles_at
from glm3cli.numerics import plain
from glm3cli.numerics.case import Case, Leaves, draw
from glm3cli.numerics.training_cases import SCALE, SHAPE, SIZES, WIDTH, heads_at

if TYPE_CHECKING:
    from glm3cli.device.kernels import Kernels

_SLOTS = 192
_GRAPH_SLOTS = 128  # that a graph reads
_GARBAGE = 7.5  # about the largest number of `draw`, in every place


def decoding_cases() -> Iterator[Case]:
    """Yields the operations of generation."""
    for tp in SIZES:
        yield _one_token(f"tp {tp}, rows alike", tp, [130, 130])
        yield _one_token(f"tp {tp}, rows of different lengths", tp, [1, _SLOTS, 77])
        yield _one_token(f"tp {tp}, rows in a graph", tp, [1, 77, 64], in_graph=True)
        yield _chunk(f"tp {tp}, a prompt", tp, 0, 96)
        yield _chunk(f"tp {tp}, more of a text", tp, 64, 40)
    yield _chunk("tp 8, one token more", 8, 64, 1)
    for tp in SIZES:
        yield _turn(tp)
    yield _linear("one token", 1)
    yield _linear("16 tokens", 16)
    yield from (_quantized(bits) for bits in (8, 4))


def _cache(rows: int, groups: int) -> dict[str, Tensor]:
    return {
        "keys": draw(rows, groups, _SLOTS, WIDTH, seed=3),
        "values": draw(rows, groups, _SLOTS, WIDTH, seed=4),
    }


def _one_token(place: str, tp: int, ends: list[int], *, in_graph: bool = False) -> Case:
    """Returns attention of one query in each row, which sees the first `ends` slots.

    Args:
        place: What the report says about the sizes.
        tp: The tensor parallel size.
        ends: The number of slots that each query sees.
        in_graph: Whether the device alone knows them, as in a captured step.
    """
    heads, groups = heads_at(tp)
    leaves = _cache(len(ends), groups)
    for one in leaves.values():
        for row, end in enumerate(ends):
            one[row, :, end:] = _GARBAGE
    leaves["query"] = draw(len(ends), groups, heads // groups, WIDTH, seed=5)

    def ours(kernels: "Kernels", leaves: Leaves) -> Tensor:
        query = leaves["query"]
        if in_graph:
            known = torch.tensor(ends, device=query.device)
            seen = kernels.seen_until(known, _GRAPH_SLOTS, _SLOTS, query.dtype)
        else:
            seen = kernels.seen(ends, query.dtype, query.device)
        return kernels.attend_one(query, leaves["keys"], leaves["values"], SCALE, seen)

    def right(leaves: Leaves) -> Tensor:
        seen = torch.arange(_SLOTS) < torch.tensor(ends).view(-1, 1, 1)
        query = leaves["query"].flatten(1, 2).unsqueeze(0)  # [1, b, heads, d]
        keys, values = (leaves[name].permute(2, 0, 1, 3) for name in ("keys", "values"))
        return plain.attention(query, keys, values, SCALE, seen)[0].view(leaves["query"].shape)

    return _decoding("attention of a new token", place, leaves, ours, right)


def _chunk(place: str, tp: int, start: int, length: int) -> Case:
    """Returns attention of `length` new queries of one row from the slot `start` on."""
    heads, groups = heads_at(tp)
    leaves = _cache(1, groups)
    for one in leaves.values():
        one[:, :, start + length :] = _GARBAGE
    leaves["query"] = draw(length, heads, WIDTH, seed=5)

    def ours(kernels: "Kernels", leaves: Leaves) -> Tensor:
        keys, values = leaves["keys"][0], leaves["values"][0]
        return kernels.attend_chunk(leaves["query"], keys, values, SCALE, start)

    def right(leaves: Leaves) -> Tensor:
        seen = plain.causal(torch.arange(start, start + length), _SLOTS)
        keys, values = (leaves[name].permute(2, 0, 1, 3) for name in ("keys", "values"))
        return plain.attention(leaves["query"].unsqueeze(1), keys, values, SCALE, seen)[:, 0]

    return _decoding("attention of a prompt", place, leaves, ours, right)


def _decoding(subject: str, place: str, leaves: Leaves, ours: Any, right: Any) -> Case:
    return Case(
        subject,
        place,
        leaves,
        ours,
        right,
        kernel="decode-attention",
        roundings=6,
        has_gradient=False,
    )


def _turn(tp: int) -> Case:
    """Returns the rotation of queries and keys in place, in the output of a linear layer."""
    heads, groups = heads_at(tp)
    angles = angles_at(torch.linspace(0, SHAPE.seq_length - 1, 20).long(), WIDTH, SHAPE.rotary_base)

    def ours(kernels: "Kernels", leaves: Leaves) -> Tensor:
        mixed = leaves["mixed"].clone()
        kernels.turn(mixed[:, :, :-1], kernels.turns(angles.to(mixed.device), mixed.dtype))
        return mixed

    def right(leaves: Leaves) -> Tensor:
        mixed = leaves["mixed"].double()
        turned = plain.rotate(mixed[:, :, :-1], angles[:, None, None])
        return torch.cat([turned, mixed[:, :, -1:]], dim=2)

    return Case(
        "rotary positions in place",
        f"tp {tp}, {heads} heads, {groups} groups",
        {"mixed": draw(len(angles), groups, heads // groups + 2, WIDTH)},
        ours,
        right,
        kernel="rotary",
        has_gradient=False,
    )


def _linear(place: str, tokens: int) -> Case:
    """Returns a linear layer of inference, whose weight the chip may lay out in its own way."""
    outputs = 2 * SHAPE.ffn_hidden_size // 8

    def ours(kernels: "Kernels", leaves: Leaves) -> Tensor:
        return kernels.linear(leaves["hidden"], kernels.pack(leaves["weight"]), leaves["bias"])

    return Case(
        "linear layer of inference",
        f"{place}, {SHAPE.hidden_size:,} -> {outputs:,}",
        {
            "hidden": draw(tokens, SHAPE.hidden_size),
            "weight": draw(outputs, SHAPE.hidden_size, seed=1),
            "bias": draw(outputs, seed=2),
        },
        ours,
        lambda leaves: _affine(leaves["hidden"], leaves["weight"], leaves["bias"]),
        kernel="linear",
        has_gradient=False,
    )


def _quantized(bits: int) -> Case:
    """Returns a linear layer with weights of 8 or 4 bits, which may multiply in bf16."""
    outputs = 512
    rounded = quantize(draw(outputs, SHAPE.hidden_size, seed=1), bits)

    def ours(kernels: "Kernels", leaves: Leaves) -> Tensor:
        hidden = leaves["hidden"]
        here = _put(rounded, hidden.device)
        packed = kernels.pack_quantized(here, hidden.dtype)
        return kernels.linear_quantized(hidden, packed, leaves["bias"])

    return Case(
        "linear layer of few bits",
        f"{bits} bits, {SHAPE.hidden_size:,} -> {outputs:,}",
        {"hidden": draw(4, SHAPE.hidden_size), "bias": draw(outputs, seed=2)},
        ours,
        lambda leaves: _affine(leaves["hidden"], rounded.weight(), leaves["bias"]),
        kernel="quantized-linear",
        has_gradient=False,
        precision=torch.bfloat16,
    )


def _put(weight: Quantized, device: torch.device) -> Quantized:
    """Returns a quantized weight on a device."""
    zeros = None if weight.zeros is None else weight.zeros.to(device)
    return Quantized(weight.bits, weight.numbers.to(device), weight.scales.to(device), zeros)


def _affine(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return hidden.double() @ weight.double().t() + bias.double()
