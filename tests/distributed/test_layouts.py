"""The same losses and gradient norms at every layout, and across a stop and a resume.

Tolerance: fp32 sums in another order differ by about 1e-7 of their size a step; 1e-5 relative
leaves room for twenty steps of AdamW, and any wrong scale or missing reduction shows as 1e-2.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import RankPool
from tests.support.training import train_steps

pytestmark = pytest.mark.dist

# Some in larger micro-batches: the same numbers in fewer messages, whose waiting costs most here.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2, "micro_batch_size": 4}),
    "tp2 without sequence parallelism": (
        2,
        {"tp": 2, "sequence_parallel": False, "micro_batch_size": 4},
    ),
    "tp4, more ranks than groups": (4, {"tp": 4, "micro_batch_size": 8}),
    "pp2": (2, {"pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2 uneven": (2, {"pp": 2, "layers_per_stage": "1,3"}),
    "pp4": (4, {"pp": 4}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2, "micro_batch_size": 4}),
    "one rank, replicated optimizer": (1, {"distributed_optimizer": False}),
    "dp2": (2, {}),
    "dp2 replicated optimizer": (2, {"distributed_optimizer": False}),
    "dp2 overlapped": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "dp2 pp2 vpp2 overlapped": (4, {"pp": 2, "vpp": 2, "overlap_grad_reduce": True}),
    "dp2 tp2": (4, {"tp": 2, "micro_batch_size": 4}),
    "cp2": (2, {"cp": 2, "micro_batch_size": 4}),
    "cp4, more ranks than groups": (4, {"cp": 4, "micro_batch_size": 8}),
    "cp2 tp2": (4, {"cp": 2, "tp": 2, "micro_batch_size": 8}),
    "cp2 pp2": (4, {"cp": 2, "pp": 2, "micro_batch_size": 4}),
    "cp2 dp2 overlapped": (
        4,
        {"cp": 2, "overlap_grad_reduce": True, "overlap_param_gather": True, "micro_batch_size": 2},
    ),
    "cp2 recompute full": (2, {"cp": 2, "recompute": "full", "micro_batch_size": 4}),
    "tp2 pp2 vpp2": (4, {"tp": 2, "pp": 2, "vpp": 2, "micro_batch_size": 4}),
    "pp3 uneven": (
        3,
        {"pp": 3, "layers_per_stage": "1,2,1", "micro_batch_size": 2},
    ),
    "recompute a block": (
        1,
        {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 2},
    ),
    "recompute pairs": (1, {"recompute": "full", "recompute_num_layers": 2}),
    "micro-batch 4": (1, {"micro_batch_size": 4}),
    "recompute full": (1, {"recompute": "full"}),
    "recompute selective": (1, {"recompute": "selective"}),
}
STEPS = 20
RESUMES = [
    ("1x1", "1x1"),
    ("tp2 pp2", "1x1"),
    ("dp2", "tp2"),
    ("pp2 vpp2", "dp2"),
    ("dp2", "dp4"),
    ("dp4", "tp2 pp2 uneven"),
    ("dp2 replicated", "tp2 replicated"),
    ("dp2 replicated", "dp4"),
    ("dp2", "dp2 replicated"),
    ("cp2", "dp2"),
    ("dp2", "cp2 tp2"),
]
RESUME_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1x1": (1, {}),
    "tp2": (2, {"tp": 2, "micro_batch_size": 4}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2, "micro_batch_size": 4}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    "cp2": (2, {"cp": 2, "micro_batch_size": 4}),
    "cp2 tp2": (4, {"cp": 2, "tp": 2, "micro_batch_size": 8}),
    "dp2 replicated": (2, {"distributed_optimizer": False}),
    "tp2 replicated": (2, {"tp": 2, "distributed_optimizer": False, "micro_batch_size": 4}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2 pp2 uneven": (
        4,
        {"tp": 2, "pp": 2, "layers_per_stage": "1,3", "micro_batch_size": 4},
    ),
}


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool) -> list[tuple[float, float]]:
    return ranks.run(1, train_steps, {}, 0, STEPS)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_alike(
    ranks: RankPool, one_rank: list[tuple[float, float]], layout: str
) -> None:
    world_size, options = LAYOUTS[layout]
    results = ranks.run(world_size, train_steps, options, 0, STEPS)
    for outcome in results:
        assert [loss for loss, _ in outcome] == pytest.approx([x for x, _ in one_rank], rel=1e-5)
        assert [norm for _, norm in outcome] == pytest.approx([x for _, x in one_rank], rel=1e-4)


def test_the_tiny_model_learns(one_rank: list[tuple[float, float]]) -> None:
    # Random labels can't be predicted, but their uniform distribution can.
    assert one_rank[-1][0] < one_rank[0][0]
    assert all(norm > 0 for _, norm in one_rank)


@pytest.mark.parametrize(("before", "after"), RESUMES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    ranks: RankPool,
    one_rank: list[tuple[float, float]],
    tmp_path: Path,
    before: str,
    after: str,
) -> None:
    world_size, options = RESUME_LAYOUTS[before]
    ranks.run(world_size, train_steps, options, 0, 10, tmp_path)
    world_size, options = RESUME_LAYOUTS[after]
    results = ranks.run(world_size, train_steps, options, 10, STEPS, None, tmp_path)
    for outcome in results:
        expected = one_rank[10:]
        assert [loss for loss, _ in outcome] == pytest.approx([x for x, _ in expected], rel=1e-5)
        assert [norm for _, norm in outcome] == pytest.approx([x for _, x in expected], rel=1e-4)
