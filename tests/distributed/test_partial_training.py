"""Training of some weights: they train as in a full training, and the others stay as they are.

The gradients of the first step don't depend on what else is trained, as long as their norm isn't
clipped; so neither do the trained weights after it. Tolerances as in test_parallel_sizes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from glm3cli.config.model import ModelConfig
from glm3cli.plan.parameters import parameters_of_rank
from tests.support.ranks import RankPool
from tests.support.tiny import TINY, train_config
from tests.support.training import first_source, train_steps
from tests.support.weights import difference, weights_of, whole_weights

pytestmark = pytest.mark.dist

UNCLIPPED = {"clip_grad": 0.0, "micro_batch_size": 4}
AT_ONCE = {"lr_warmup_iters": 0}
ELEMENTS = 2e-5  # absolute; a step moves an element by up to 1e-2
CHOICES: dict[str, dict[str, Any]] = {
    "last layers": {"train_only": r"layers\.[23]\.|output_layer"},
    "one module": {"train_only": r"layers\.1\.self_attention\.dense"},
    "biases": {"train_only": r"\.bias$"},
    "embeddings": {"train_only": "word_embeddings"},
    "no embeddings and norms": {"freeze": "word_embeddings|norm"},
}
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {"micro_batch_size": 2}),
    "recompute full": (1, {"recompute": "full"}),
    "tp2 pp2 recompute full": (4, {"tp": 2, "pp": 2, "recompute": "full"}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2, "micro_batch_size": 2}),
    "pp2 dp2": (4, {"pp": 2, "micro_batch_size": 2}),
}


def after(ranks: RankPool, size: int, steps: int, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after some steps."""
    found = ranks.run(size, train_steps, {**UNCLIPPED, **options}, 0, steps)
    return whole_weights([rank.pieces for rank in found], TINY)


@pytest.fixture(scope="module")
def full(ranks: RankPool) -> dict[str, torch.Tensor]:
    return after(ranks, 1, 1, **AT_ONCE)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_chosen_weights_train_as_ever_and_the_others_stay(
    ranks: RankPool, full: dict[str, torch.Tensor], choice: str
) -> None:
    config = train_config(**CHOICES[choice])
    start, found = weights_of(first_source()), after(ranks, 1, 1, **CHOICES[choice], **AT_ONCE)
    for name, tensor in found.items():
        assert torch.equal(tensor, (full if config.trains(name) else start)[name]), name
    moved = [name for name in found if not torch.equal(found[name], start[name])]
    assert 0 < len(moved) < len(found)


# Those with a stage of which nothing is trained, or a bias apart from its weight.
FIRST = {("last layers", "pp2"), ("last layers", "tp2 pp2 recompute full"), ("biases", "tp2")}
FIRST |= {("embeddings", "pp2 vpp2"), ("last layers", "dp2")}


@pytest.mark.parametrize(
    ("choice", "sizes"),
    [
        pytest.param(choice, sizes, marks=[] if (choice, sizes) in FIRST else pytest.mark.slow)
        for choice in ("last layers", "biases", "embeddings")
        for sizes in SIZES
    ],
)
def test_all_parallel_sizes_train_alike(ranks: RankPool, choice: str, sizes: str) -> None:
    world_size, options = SIZES[sizes]
    expected = after(ranks, 1, 3, **CHOICES[choice])
    found = after(ranks, world_size, 3, **CHOICES[choice], **options)
    assert difference(found, expected, weights_of(first_source()), TINY).absolute < ELEMENTS


@pytest.mark.parametrize("sizes", ["pp2", "dp2"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    ranks: RankPool, tmp_path: Path, sizes: str
) -> None:
    options = {**UNCLIPPED, **CHOICES["last layers"]}
    size, own = SIZES[sizes]
    ranks.run(size, train_steps, {**options, **own}, 0, 2, tmp_path)
    [found] = ranks.run(1, train_steps, options, 2, 4, None, tmp_path)
    [expected] = ranks.run(1, train_steps, options, 0, 4)
    assert found.losses == pytest.approx(expected.losses[2:], rel=1e-5)
    assert found.grad_norms == pytest.approx(expected.grad_norms[2:], rel=1e-4)


def buffered(options: dict[str, Any]) -> int:
    """The number of elements that this rank has gradients and optimizer state for."""
    from glm3cli.parallel.groups import open_grid
    from tests.support.training import build

    with open_grid(train_config(**options)) as grid:
        _, train_step, _ = build(options, grid)
        return sum(b.grad_data.numel() for chunk in train_step.chunks for b in chunk.buffers)


@pytest.mark.parametrize("choice", CHOICES)
def test_only_the_chosen_weights_have_gradients_and_the_plan_knows(
    ranks: RankPool, choice: str
) -> None:
    model: ModelConfig = TINY
    options = {**CHOICES[choice], "pp": 2, "distributed_optimizer": False}
    counts = ranks.run(2, buffered, options)
    config = train_config(**options)
    assert counts == [parameters_of_rank(config, model, stage).trained for stage in range(2)]
