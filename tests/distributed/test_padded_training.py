"""Samples of different lengths train alike, however a micro-batch is padded, at all parallel sizes.

The reference has micro-batches of one sample each, without padding, on one rank. The tolerance is
that of test_parallel_sizes: fp32 sums in another order, 1e-5 of the losses and 1e-4 of the gradient
norms. Padding that attention sees, or a wrong shape between two stages, changes the first digits.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.ranks import RankPool
from tests.support.samples import write_instructions
from tests.support.training import build

pytestmark = pytest.mark.dist

SIZES = [30, 3, 17, 8, 25, 12, 31, 5, 9, 22, 14, 6, 28, 10, 19, 4]
BATCH, STEPS = 8, 2
REFERENCE: dict[str, Any] = {"pad_to_multiple": 1}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"padding": "full"},
    "right": {"pad_to_multiple": 4},
    "left": {"padding_side": "left", "pad_to_multiple": 4},
    "left, full": {"padding_side": "left", "padding": "full"},
}
PARALLEL_SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "recompute full": (1, {"recompute": "full"}),
    "recompute selective": (1, {"recompute": "selective"}),
    "tp2": (2, {"tp": 2}),
    "tp2 without sequence parallelism": (2, {"tp": 2, "sequence_parallel": False}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2": (2, {}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "cp2 pp2": (4, {"cp": 2, "pp": 2}),
    "pp2 dp2": (4, {"pp": 2}),
}
CASES = [
    *(("one rank", way) for way in WAYS),
    *((sizes, "left") for sizes in PARALLEL_SIZES if sizes != "one rank"),
    *((sizes, "right") for sizes in ("pp2 vpp2", "cp2 pp2")),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    random = np.random.default_rng(3)
    documents = []
    for size in SIZES:
        tokens = random.integers(3, 128, size + 1).tolist()
        documents.append((tokens[: 1 + size // 3], tokens[1 + size // 3 :]))
    return write_instructions(tmp_path_factory.mktemp("padded") / "samples", documents)


def losses(prefix: str, options: dict[str, Any]) -> tuple[list[float], list[float], float]:
    """Trains on all samples; returns losses, gradient norms, and the loss of a validation."""
    from glm3cli.data.prefixes import Blend
    from glm3cli.data.samples.instructions import build_instruction
    from glm3cli.data.samples.spec import DataSpec
    from glm3cli.parallel.groups import open_grid
    from tests.support.tiny import train_config
    from tests.support.tiny_tokenizer import tiny_tokenizer

    with open_grid(train_config(**options)) as grid:
        config, train_step, loader = build(options, grid)
        spec = DataSpec(Blend((prefix,), None), "1,0,0", config.seq_length, 1, len(SIZES), 0)
        dataset, _ = build_instruction(spec.with_instructions(config), tiny_tokenizer())
        loader = replace(loader, dataset=dataset)
        outcomes = [train_step.run(loader, step * BATCH) for step in range(STEPS)]
        validation = train_step.validate(loader, 2)
        assert validation is not None
        return (
            [outcome.loss for outcome in outcomes],
            [outcome.grad_norm for outcome in outcomes],
            validation.mean_loss,
        )


@pytest.fixture(scope="module")
def expected(files: str, ranks: RankPool) -> tuple[list[float], list[float], float]:
    return ranks.run(1, losses, files, {"global_batch_size": BATCH, **REFERENCE})[0]


@pytest.mark.parametrize(("sizes", "way"), CASES)
def test_padding_changes_nothing(
    files: str,
    ranks: RankPool,
    expected: tuple[list[float], list[float], float],
    sizes: str,
    way: str,
) -> None:
    world_size, options = PARALLEL_SIZES[sizes]
    options = {"global_batch_size": BATCH, "micro_batch_size": 2, **options, **WAYS[way]}
    for found, norms, validation in ranks.run(world_size, losses, files, options):
        assert found == pytest.approx(expected[0], rel=1e-5)
        assert norms == pytest.approx(expected[1], rel=1e-4)
        assert validation == pytest.approx(expected[2], rel=1e-5)


@pytest.mark.parametrize("sizes", ["tp2 pp2", "cp2"])
def test_all_in_packs_train_as_one_by_one(files: str, ranks: RankPool, sizes: str) -> None:
    """An epoch in one step: packs and samples hold the same, though in another order."""
    alone = {"global_batch_size": len(SIZES), **REFERENCE}
    [(loss, _), (norm, _)] = ranks.run(1, losses, files, alone)[0][:2]
    world_size, options = PARALLEL_SIZES[sizes]
    packs = {"packing": True, "global_batch_size": 8, "pad_to_multiple": 4, **options}
    for found, norms, _ in ranks.run(world_size, losses, files, packs):
        assert found[0] == pytest.approx(loss, rel=1e-5)
        assert norms[0] == pytest.approx(norm, rel=1e-4)
