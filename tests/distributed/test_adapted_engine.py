"""The inference engine computes with an adapter as with the weights that it is merged into."""

from typing import Any

import pytest
import torch

from glm3cli.checkpoint.adapter.pairs import Adapter, Pair
from glm3cli.checkpoint.names import Weight, slots
from glm3cli.config.options.lora import TARGETS
from glm3cli.config.parallel import ParallelConfig
from glm3cli.infer.sampling import Sampling
from tests.support.ranks import RankPool
from tests.support.tiny import TINY
from tests.support.training import first_source

pytestmark = pytest.mark.dist

PROMPTS = ([7, 3, 99], [5], [64, 65, 66, 67, 68, 69, 70, 1, 2])
CONTINUATIONS = ([4, 8], [100], [1, 2, 3, 4, 5])
SIZES: dict[str, tuple[int, dict[str, int]]] = {
    "one rank": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp4, more ranks than groups": (4, {"tp": 4}),
    "pp2": (2, {"pp": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
}


def random_adapter() -> Adapter:
    """An adapter of other ranks and scales in every layer, which leaves some modules out."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for number, (weight, layer) in enumerate(slots(TINY)):
        if weight.logical not in TARGETS.values() or (weight.logical, layer) == ("mlp_up", 2):
            continue
        outputs, inputs = weight.shape(TINY)
        rank = 1 + number % 5
        a, b = (
            torch.randn(shape, generator=generator) * 0.1
            for shape in ((rank, inputs), (outputs, rank))
        )
        found[weight, layer] = [Pair(slice(0, outputs), a, b, scale=1 + number / 10)]
    return Adapter(found)


class Merged:
    """The base model with the adapter merged."""

    model = TINY

    def read(self, weight: Weight, layer: int | None = None) -> torch.Tensor:
        return random_adapter().merge(weight, layer, first_source().read(weight, layer))


def answers(sizes: dict[str, int], kind: str) -> tuple[list[Any], list[float]]:
    """The greedy continuations of the prompts, and the scores of given ones.

    Args:
        sizes: The parallel sizes.
        kind: Whether the model is the bare "base", "merged", or computes with an "adapter".
    """
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig(**sizes)
    source = Merged() if kind == "merged" else first_source()
    with open_grid(parallel) as grid:
        adapter = random_adapter() if kind == "adapter" else None
        engine = Engine(source, parallel, "fp32", grid, adapter=adapter)
        found = engine.generate(PROMPTS, Sampling(greedy=True), 8, [])
        scores = engine.continuation_logprobs(PROMPTS, CONTINUATIONS)
        return [one.token_ids for one in found], [score for score, _ in scores]


@pytest.mark.parametrize("name", SIZES)
def test_it_computes_as_the_merged_model(ranks: RankPool, name: str) -> None:
    world_size, sizes = SIZES[name]
    [(tokens, scores)] = ranks.run(1, answers, {}, "merged")
    for found in ranks.run(world_size, answers, sizes, "adapter"):
        assert found[0] == tokens
        assert found[1] == pytest.approx(scores, abs=5e-5)
    [(_, without)] = ranks.run(1, answers, {}, "base")
    assert max(abs(one - other) for one, other in zip(scores, without, strict=True)) > 0.1
