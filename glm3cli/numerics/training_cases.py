"""The operations of training at the shapes of ChatGLM3-6B, and the traps that are known of them.

A trap is an input with which an operator is known to return wrong numbers silently: packs without
a mask for each sample, padding on the left, rows of padding alone, more samples than an operator
takes at once, positions beyond the size of a compressed mask, and what overflows in fp16.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding

from glm3cli.config.presets import PRESETS
from glm3cli.model.rotary import angles_at
from glm3cli.numerics import plain
from glm3cli.numerics.case import Case, Leaves, draw

if TYPE_CHECKING:
    from glm3cli.device.kernels import Kernels

SHAPE = PRESETS["6b"]
SIZES = (1, 2, 4, 8)  # tensor parallel sizes
WIDTH = SHAPE.kv_channels
SCALE = WIDTH**-0.5
_TOKENS, _ROWS = 24, 2
# Attention rounds its probabilities, too, and sums over all positions twice; its gradients are
# differences of such sums.
_OF_ATTENTION, _SUMS_OF_ATTENTION, _DIFFERENCES = 6, 256, 16


def heads_at(tp: int) -> tuple[int, int]:
    """Returns the numbers of query heads and of groups of a tensor parallel rank of the 6B."""
    return SHAPE.num_attention_heads // tp, max(1, SHAPE.num_query_groups // tp)


def training_cases(long: int) -> Iterator[Case]:
    """Yields the operations of training.

    Args:
        long: The number of positions of a long sequence.
    """
    yield _rms_norm()
    yield from map(_swiglu, SIZES)
    for tp in SIZES:
        yield _rotation(f"tp {tp}", _TOKENS, _ROWS, heads_at(tp)[0])
    yield _rotation("32 rows", 3, 32, heads_at(1)[0])
    yield _angles()
    for tp in SIZES:
        yield _attention(f"tp {tp}", 160, _ROWS, tp)
    yield _attention(f"tp 8, {long:,} positions", long, 1, 8, sample=True)
    yield from _packed()
    yield _cross_entropy()
    yield _embedding()
    yield from _products()


def _rms_norm() -> Case:
    def ours(kernels: "Kernels", leaves: Leaves) -> Tensor:
        return kernels.rms_norm(leaves["hidden"], leaves["weight"], SHAPE.layernorm_epsilon)

    hidden = draw(_TOKENS, _ROWS, SHAPE.hidden_size)
    hidden[0, 0] = 0  # its norm is that of epsilon alone
    hidden[0, 0, 0] = 2**-8
    return Case(
        "RMSNorm",
        f"{_TOKENS} x {_ROWS} x {SHAPE.hidden_size}",
        {"hidden": hidden, "weight": draw(SHAPE.hidden_size)},
        ours,
        lambda leaves: plain.rms_norm(leaves["hidden"], leaves["weight"], SHAPE.layernorm_epsilon),
        kernel="rms-norm",
    )


def _swiglu(tp: int) -> Case:
    width = 2 * SHAPE.ffn_hidden_size // tp
    return Case(
        "SwiGLU",
        f"tp {tp}",
        {"values": draw(_TOKENS, _ROWS, width)},
        lambda kernels, leaves: kernels.swiglu(leaves["values"]),
        lambda leaves: plain.swiglu(leaves["values"]),
        kernel="swiglu",
    )


def _positions(count: int) -> Tensor:
    """Returns positions up to the longest of the 6B, among them the first and the last."""
    return torch.linspace(0, SHAPE.seq_length - 1, count).long()


def _rotation(place: str, length: int, rows: int, heads: int) -> Case:
    """Returns the rotation of heads at positions up to the last that the 6B was trained on."""
    # Each row has positions of its own where there are few, as packs have.
    angles = angles_at(_positions(length), WIDTH, SHAPE.rotary_base)[:, None, None]

    def ours(kernels: "Kernels", leaves: Leaves) -> Tensor:
        values = leaves["heads"]
        return kernels.rotate(values, kernels.rotation(angles.to(values.device), values.dtype))

    return Case(
        "rotary positions",
        f"{place}, {heads} heads",
        {"heads": draw(length, rows, heads, WIDTH)},
        ours,
        lambda leaves: plain.rotate(leaves["heads"], angles),
        kernel="rotary",
    )


def _angles() -> Case:
    """Returns the angles themselves, which are computed in fp32 whatever the type."""
    positions = _positions(96)
    pairs = torch.arange(0, WIDTH // 2, 2, dtype=torch.float64) / (WIDTH // 2)

    def ours(_: "Kernels", leaves: Leaves) -> Tensor:
        return angles_at(leaves["positions"], WIDTH, SHAPE.rotary_base)

    return Case(
        "rotary angles",
        f"positions up to {SHAPE.seq_length - 1:,}",
        {"positions": positions},
        ours,
        lambda leaves: torch.outer(leaves["positions"].double(), SHAPE.rotary_base**-pairs),
        has_gradient=False,
        has_types=False,
    )


def _attention(place: str, length: int, rows: int, tp: int, sample: bool = False) -> Case:
    """Returns causal attention of one sample in each row.

    Args:
        place: What the report says about the shape.
        length: The number of positions.
        rows: The number of rows.
        tp: The tensor parallel size.
        sample: Whether some of the queries are compared, and not all.
    """
    heads, groups = heads_at(tp)
    queries = torch.arange(length)
    if sample:  # around the size of a compressed mask, and at both ends
        queries = torch.tensor([0, 1, 511, length // 2, 2047, 2048, 2049, length - 2, length - 1])
    return Case(
        "attention",
        f"{place}, {heads} heads, {groups} groups",
        _attended(length, rows, heads, groups),
        partial(_attend, None, queries),
        partial(_attend_plainly, None, queries),
        kernel="attention",
        roundings=_OF_ATTENTION,
        sums=_SUMS_OF_ATTENTION,
        differences=_DIFFERENCES,
    )


def _attended(length: int, rows: int, heads: int, groups: int) -> dict[str, Tensor]:
    """Returns queries, and keys and values side by side, as linear layers give them."""
    return {
        "query": draw(length, rows, heads, WIDTH, seed=1),
        "key and value": draw(length, rows, groups, 2 * WIDTH, seed=2),
    }


def _attend(segments: Tensor | None, queries: Tensor, kernels: "Kernels", leaves: Leaves) -> Tensor:
    """Computes on the device the context of some positions of the sequences."""
    query = leaves["query"]
    key, value = torch.split(leaves["key and value"], WIDTH, dim=-1)
    ids = None if segments is None else segments.to(query.device)
    return _of_samples(segments, kernels.attention(query, key, value, SCALE, ids)[queries], queries)


def _attend_plainly(segments: Tensor | None, queries: Tensor, leaves: Leaves) -> Tensor:
    """Computes the same on the host."""
    query = leaves["query"]
    key, value = torch.split(leaves["key and value"], WIDTH, dim=-1)
    seen = plain.causal(queries, len(query), segments)
    context = plain.attention(query[queries], key, value, SCALE, seen)
    return _of_samples(segments, context, queries)


def _of_samples(segments: Tensor | None, context: Tensor, queries: Tensor) -> Tensor:
    """Leaves the positions of padding out, which no loss looks at; [q, b, ...] -> [n, ...]."""
    if segments is None:
        return context
    places = (segments[:, queries].t() > 0).flatten().nonzero().flatten()
    return context.flatten(0, 1).index_select(0, places.to(context.device))


def _packed() -> Iterator[Case]:
    """Yields attention within the samples of packed and of padded rows; sample 0 is padding."""
    heads, groups = heads_at(8)
    left, right = [0] * 40 + [1] * 56, [1] * 56 + [0] * 40
    rows = {
        "packs": [[1] * 50 + [2] * 46, [1] + [2] * 30 + [3] + [4] * 64, [1] * 96],
        "a pack with padding": [[1] * 50 + [2] * 26 + [0] * 20, [1] * 96],
        "padding on the left": [left, [1] * 96],
        "padding on the right": [right, [1] * 96],
        "a row of padding alone": [[0] * 96, right, [0] * 96],
        # More than an operator takes at once.
        "packs of 1,100 samples": [
            [*range(1, 1068), *(n for n in range(1068, 1101) for _ in "ab")]
        ],
    }
    for name, ids in rows.items():
        segments = torch.tensor(ids)
        queries = torch.arange(segments.size(1))
        yield Case(
            "attention within samples",
            name,
            _attended(segments.size(1), segments.size(0), heads, groups),
            partial(_attend, segments, queries),
            partial(_attend_plainly, segments, queries),
            kernel="attention",
            roundings=_OF_ATTENTION,
            sums=_SUMS_OF_ATTENTION,
            differences=_DIFFERENCES,
        )


def _cross_entropy() -> Case:
    labels = torch.arange(_TOKENS * _ROWS).view(_TOKENS, _ROWS) * 1_021 % SHAPE.padded_vocab_size
    labels[0, 0], labels[0, 1] = 0, SHAPE.padded_vocab_size - 1
    return Case(
        "cross-entropy",
        f"{SHAPE.padded_vocab_size:,} tokens",
        {"logits": draw(_TOKENS, _ROWS, SHAPE.padded_vocab_size), "labels": labels},
        lambda kernels, leaves: kernels.cross_entropy(leaves["logits"], leaves["labels"]),
        lambda leaves: plain.cross_entropy(leaves["logits"], leaves["labels"]),
        kernel="cross-entropy",
    )


def _embedding() -> Case:
    """Returns the embedding of tokens of which some come again and again, as in texts."""
    vocab = SHAPE.padded_vocab_size // 8
    ids = torch.arange(200) ** 2 % 31 * (vocab // 31)
    return Case(
        "embedding",
        "tp 8, tokens that come again",
        {"weight": draw(vocab, 256), "ids": ids},
        lambda _, leaves: embedding(leaves["ids"], leaves["weight"]),
        lambda leaves: leaves["weight"].double()[leaves["ids"]],
        roundings=16,  # a token's gradients may be added up in 16 bits
    )


def _products() -> Iterator[Case]:
    """Yields the matrix products of linear layers, of which some outputs are compared."""
    h, ffn = SHAPE.hidden_size, SHAPE.ffn_hidden_size
    shapes = {
        "tp 8, attention in": (h, (SHAPE.query_size + 2 * SHAPE.kv_size) // 8),
        "tp 8, MLP down": (ffn // 8, h),
    }
    for name, (inputs, outputs) in shapes.items():
        some = torch.linspace(0, outputs - 1, 48).long()

        def ours(_: "Kernels", leaves: Leaves, some: Tensor = some) -> Tensor:
            return torch.nn.functional.linear(leaves["inputs"], leaves["weight"])[:, some]

        def right(leaves: Leaves, some: Tensor = some) -> Tensor:
            return leaves["inputs"].double() @ leaves["weight"][some].double().t()

        yield Case(
            "matrix product",
            f"{name}, {inputs:,} -> {outputs:,}",
            {"inputs": draw(16, inputs), "weight": draw(outputs, inputs, seed=1)},
            ours,
            right,
        )
