"""Packed samples train as they do one by one: none sees another, at all parallel sizes.

The tolerance is that of test_parallel_sizes: fp32 sums in another order, 1e-5 of the loss and 1e-4
of the norm. A sample that sees its neighbour changes the loss in the second digit.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ranks import RankPool
from tests.support.samples import write_documents
from tests.support.training import build

pytestmark = pytest.mark.dist

LENGTHS = [10, 10, 12]  # tokens of the samples in a pack
PACKS = 4
PARALLEL_SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "two packs at a time": (1, {"micro_batch_size": 2}),
    "recompute full": (1, {"recompute": "full"}),
    "recompute selective": (1, {"recompute": "selective"}),
    "tp2": (2, {"tp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "dp2": (2, {}),
}


def write_files(prefix: Path, *, packed: bool, blind: bool = False) -> None:
    """Writes the same samples one by one or in packs; `blind` leaves out where samples begin."""
    random = np.random.default_rng(3)
    samples = []
    for _ in range(PACKS):
        for length in LENGTHS:
            tokens = random.integers(3, 128, length).tolist()
            labels = [-100] * (length // 2) + tokens[length // 2 :]
            samples.append((tokens, labels))
    size = len(LENGTHS) if packed else 1
    packs = [samples[i : i + size] for i in range(0, len(samples), size)]
    segment_ids = [
        [1 if blind else n for n, (ids, _) in enumerate(pack, start=1) for _ in ids]
        for pack in packs
    ]
    columns = {
        "input_ids": [[token for ids, _ in pack for token in ids] for pack in packs],
        "labels": [[label for _, labels in pack for label in labels] for pack in packs],
        "attention_mask": segment_ids,
    }
    for key, sequences in columns.items():
        write_documents(f"{prefix}_packed_{key}_document", sequences)


def one_step(prefix: str, options: dict[str, Any]) -> tuple[float, float]:
    """Trains one step on all samples and returns its loss and gradient norm; runs on the pool."""
    from glm3cli.data.prefixes import Blend
    from glm3cli.data.samples.instructions import build_instruction
    from glm3cli.data.samples.spec import DataSpec
    from glm3cli.parallel.groups import open_grid
    from tests.support.tiny import train_config
    from tests.support.tiny_tokenizer import tiny_tokenizer

    with open_grid(train_config(**options)) as grid:
        config, train_step, loader = build(options, grid)
        count = config.global_batch_size
        spec = DataSpec(Blend((prefix,), None), "1,0,0", config.seq_length, 1, count, 0)
        dataset, _ = build_instruction(spec, tiny_tokenizer())
        assert len(dataset) == count
        outcome = train_step.run(replace(loader, dataset=dataset), 0)
        return outcome.loss, outcome.grad_norm


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    write_files(folder / "single", packed=False)
    write_files(folder / "packed", packed=True)
    write_files(folder / "blind", packed=True, blind=True)
    return folder


@pytest.fixture(scope="module")
def expected(files: Path, ranks: RankPool) -> tuple[float, float]:
    options = {"global_batch_size": PACKS * len(LENGTHS)}
    return ranks.run(1, one_step, str(files / "single"), options)[0]


@pytest.mark.parametrize("sizes", PARALLEL_SIZES)
def test_packs_train_as_their_samples_do(
    files: Path, ranks: RankPool, expected: tuple[float, float], sizes: str
) -> None:
    world_size, options = PARALLEL_SIZES[sizes]
    options = {"global_batch_size": PACKS, **options}
    for loss, norm in ranks.run(world_size, one_step, str(files / "packed"), options):
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert norm == pytest.approx(expected[1], rel=1e-4)


def test_without_their_boundaries_it_would_show(
    files: Path, ranks: RankPool, expected: tuple[float, float]
) -> None:
    options = {"global_batch_size": PACKS}
    [(loss, _)] = ranks.run(1, one_step, str(files / "blind"), options)
    assert loss != pytest.approx(expected[0], rel=1e-4)
