"""Requests side by side with an adapter each are answered as by models that it is merged into."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from glm3cli.checkpoint.adapter.pairs import Adapter, Pair
from glm3cli.checkpoint.names import Weight
from glm3cli.config.parallel import ParallelConfig
from glm3cli.infer.requests import Request
from glm3cli.infer.sampling import Sampling
from tests.distributed.test_adapted_engine import PROMPTS, SIZES, random_adapter
from tests.support.ranks import RankPool
from tests.support.tiny import TINY
from tests.support.training import first_source

pytestmark = pytest.mark.dist

# Every prompt with every model, and a long one, which others begin like.
LONG = list(range(2, 42))
NAMES = (None, "lora", "dora", "pissa")
TEXTS = [(prompt, name) for prompt in (*PROMPTS, LONG, [*LONG, 7]) for name in NAMES]


def adapters() -> dict[str, Adapter]:
    """An adapter of each kind; those of DoRA have no length for some rows."""
    lora = random_adapter()
    generator = torch.Generator().manual_seed(6)

    def changed(name: str, pair: Pair) -> Pair:
        if name == "dora":
            lengths = 1 + torch.rand(pair.b.size(0), generator=generator)
            lengths[::5] = math.nan
            return replace(pair, magnitude=lengths, a=pair.a.flip(0))
        start = (pair.a.flip(1), pair.b.flip(0))
        return replace(pair, start=start, scale=0.5)

    found = {"lora": lora}
    for name in ("dora", "pissa"):
        pairs = {slot: [changed(name, pair) for pair in one] for slot, one in lora.pairs.items()}
        found[name] = Adapter(pairs)
    return found


class Merged:
    """The base model with one of the adapters merged."""

    model = TINY

    def __init__(self, name: str | None) -> None:
        self._adapter = adapters()[name] if name else None

    def read(self, weight: Weight, layer: int | None = None) -> torch.Tensor:
        tensor = first_source().read(weight, layer)
        return tensor if self._adapter is None else self._adapter.merge(weight, layer, tensor)


def run(source: Any, sizes: dict[str, int], asked: Sequence[Any], choices: Any) -> list[Any]:
    """Answers requests side by side, and scores their prompts."""
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig(**sizes)
    with open_grid(parallel) as grid:
        engine = Engine(source, parallel, "fp32", grid, choices=choices)
        requests = [
            Request(prompt, Sampling(greedy=True), 6, adapter=name) for prompt, name in asked
        ]
        found = engine.answer(requests)
        names = dict.fromkeys(name for _, name in asked)
        scored = {name: engine.token_logprobs([LONG, [5]], 2, name) for name in names}
        return [
            [(one.token_ids, one.logprobs) for one in found],
            {name: [one.logprob for one in rows[0]] for name, rows in scored.items()},
        ]


def together(sizes: dict[str, int]) -> list[Any]:
    return run(first_source(), sizes, TEXTS, adapters())


def alone(name: str | None) -> list[Any]:
    asked = [(prompt, None) for prompt, one in TEXTS if one == name]
    return run(Merged(name), {}, asked, None)


MERGED: dict[str | None, Any] = {}


@pytest.mark.parametrize("name", SIZES)
def test_each_is_answered_as_by_the_merged_model(ranks: RankPool, name: str) -> None:
    world_size, sizes = SIZES[name]
    for one in NAMES if not MERGED else ():
        [MERGED[one]] = ranks.run(1, alone, one)
    expected: list[Any] = [None] * len(TEXTS)
    for one in NAMES:
        places = [place for place, (_, other) in enumerate(TEXTS) if other == one]
        for place, answer in zip(places, MERGED[one][0], strict=True):
            expected[place] = answer
    assert len({str(tokens) for tokens, _ in expected[: len(NAMES)]}) > 2
    for found, scores in ranks.run(world_size, together, sizes):
        for (tokens, logprobs), (wanted, others) in zip(found, expected, strict=True):
            assert tokens == wanted
            assert logprobs == pytest.approx(others, abs=5e-5)
        for one in NAMES:
            assert scores[one] == pytest.approx(MERGED[one][1][None], abs=5e-5)
