"""Training on the emulated NPU equals training on the CPU."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import RankPool
from tests.support.training import Trained, train_steps
from tests.support.tuning import tune

pytestmark = pytest.mark.dist

SIZES: dict[str, dict[str, Any]] = {
    "tp1 pp1": {},
    "tp2 pp1": {"tp": 2, "micro_batch_size": 4},
    "tp1 pp2": {"pp": 2, "micro_batch_size": 2},
}
STEPS = 20


def world_size(options: dict[str, Any]) -> int:
    return options.get("tp", 1) * options.get("pp", 1) * options.get("dp", 1)


def assert_alike(found: Trained, expected: Trained, first: int = 0, loss: float = 1e-5) -> None:
    """Compares fp32 trainings, whose sums in another order differ by 1e-7 of their size a step."""
    assert found.losses == pytest.approx(expected.losses[first:], rel=loss)
    assert found.grad_norms == pytest.approx(expected.grad_norms[first:], rel=10 * loss)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES)
def test_20_steps_have_the_cpus_losses(
    ranks: RankPool, npu_ranks: RankPool, tmp_path: Path, sizes: str
) -> None:
    """A checkpoint is saved after the last of them."""
    options = SIZES[sizes]
    size = world_size(options)
    [*_, expected] = ranks.run(size, train_steps, options, 0, STEPS)
    for found in npu_ranks.run(size, train_steps, options, 0, STEPS, tmp_path):
        assert_alike(found, expected)
    assert (tmp_path / "metadata.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["tp1 pp1", "tp2 pp1"])
def test_adapters_have_the_cpus_losses(ranks: RankPool, npu_ranks: RankPool, sizes: str) -> None:
    options = {"lora_rank": 4, **SIZES[sizes]}
    size = world_size(options)
    [*_, expected] = ranks.run(size, tune, options)
    for found in npu_ranks.run(size, tune, options):
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_preferences_have_the_cpus_losses(
    ranks: RankPool, npu_ranks: RankPool, method: str
) -> None:
    options = {"method": method, "seq_length": 32, "lr": 1e-3, "pp": 2, "micro_batch_size": 2}
    [*_, expected] = ranks.run(2, train_steps, options, 0, 6)
    for found in npu_ranks.run(2, train_steps, options, 0, 6):
        assert_alike(found, expected)


MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2 distributed optimizer, overlapped": (
        2,
        {"overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "recompute full": (1, {"recompute": "full"}),
    "recompute selective": (1, {"recompute": "selective"}),
    "cp2": (2, {"cp": 2, "micro_batch_size": 4}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2, messages one by one": (2, {"pp": 2, "batched_messages": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_what_training_can_do_runs_on_npus(ranks: RankPool, npu_ranks: RankPool, name: str) -> None:
    size, options = MORE[name]
    [*_, expected] = ranks.run(size, train_steps, options, 0, 4)
    for found in npu_ranks.run(size, train_steps, options, 0, 4):
        assert_alike(found, expected)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits_train_as_on_the_cpu(ranks: RankPool, npu_ranks: RankPool, dtype: str) -> None:
    """The first step differs by roundings of 8 or 11 binary digits alone; later ones by more."""
    options = {"dtype": dtype}
    [expected] = ranks.run(1, train_steps, options, 0, 2)
    [found] = npu_ranks.run(1, train_steps, options, 0, 2)
    assert_alike(found, expected, loss=3e-3)


@pytest.mark.parametrize(
    "options",
    [pytest.param({"dtype": "bf16"}, marks=pytest.mark.slow), {}],
    ids=["replicated", "distributed"],
)
def test_resumes(npu_ranks: RankPool, tmp_path: Path, options: dict[str, Any]) -> None:
    """The fused AdamW takes the number of its steps on the card, also from a checkpoint."""
    size = 1 if options else 2
    expected = npu_ranks.run(size, train_steps, options, 0, 4)
    npu_ranks.run(size, train_steps, options, 0, 2, tmp_path)
    found = npu_ranks.run(size, train_steps, options, 2, 4, None, tmp_path)
    assert [one.losses for one in found] == [one.losses[2:] for one in expected]
    assert [one.grad_norms for one in found] == [one.grad_norms[2:] for one in expected]


@pytest.mark.parametrize("sizes", SIZES)
def test_mindspeed_trains_alike(ranks: RankPool, mindspeed_ranks: RankPool, sizes: str) -> None:
    options = SIZES[sizes]
    size = world_size(options)
    [*_, expected] = ranks.run(size, train_steps, options, 0, STEPS)
    for found in mindspeed_ranks.run(size, train_steps, options, 0, STEPS):
        assert_alike(found, expected)


@pytest.mark.parametrize("before", ["CPU", "MindSpeed"])
def test_mindspeeds_optimizer_resumes(
    ranks: RankPool, mindspeed_ranks: RankPool, tmp_path: Path, before: str
) -> None:
    """Its AdamW counts steps elsewhere than torch's; checkpoints fit both."""
    [expected] = ranks.run(1, train_steps, {}, 0, 10)
    first, second = ranks, mindspeed_ranks
    if before == "MindSpeed":
        first, second = second, first
    first.run(2, train_steps, {}, 0, 5, tmp_path)
    for found in second.run(2, train_steps, {}, 5, 10, None, tmp_path):
        assert_alike(found, expected, first=5)
