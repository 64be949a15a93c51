"""Losses, gradient norms, and weights are the same at all parallel sizes, and after a resume.

The tolerance of losses is 1e-5: fp32 sums in another order differ by about 1e-7 of their size a
step, which leaves room for ten steps of AdamW; a wrong scale or a missing reduction shows as 1e-2.
A weight's difference at the end, relative to what training has changed of it, comes to some 5e-6;
the last step alone, whose learning rate is the lowest, is 1e-2 of it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.checkpoints import assert_same, read_all
from tests.support.ranks import RankPool
from tests.support.slow import mostly_slow
from tests.support.tiny import TINY
from tests.support.training import Trained, first_source, train_steps
from tests.support.weights import Difference, difference, weights_of, whole_weights

pytestmark = pytest.mark.dist

OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# Larger micro-batches give the same numbers with fewer messages, and the wait for messages takes
# most of the time here.
PARALLEL_SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2, "micro_batch_size": 4}),
    "tp2 without sequence parallelism": (
        2,
        {"tp": 2, "sequence_parallel": False, "micro_batch_size": 4},
    ),
    "tp2 sending while it multiplies": (2, {"tp": 2, "mc2": True, "micro_batch_size": 4}),
    "tp4, more ranks than groups": (4, {"tp": 4, "micro_batch_size": 8}),
    "pp2": (2, {"pp": 2, "micro_batch_size": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2, "micro_batch_size": 2}),
    "pp2 uneven": (2, {"pp": 2, "layers_per_stage": "1,3", "micro_batch_size": 2}),
    "pp4": (4, {"pp": 4}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2, "micro_batch_size": 4}),
    "one rank, replicated optimizer": (
        1,
        {"distributed_optimizer": False, "micro_batch_size": 4},
    ),
    "dp2": (2, {"micro_batch_size": 2}),
    "dp2 replicated optimizer": (2, {"distributed_optimizer": False, "micro_batch_size": 2}),
    "dp2 overlapped": (2, {**OVERLAPPED, "micro_batch_size": 2}),
    "dp2 pp2 vpp2 overlapped": (4, {"pp": 2, "vpp": 2, "overlap_grad_reduce": True}),
    "dp2 tp2": (4, {"tp": 2, "micro_batch_size": 4}),
    "cp2": (2, {"cp": 2, "micro_batch_size": 4}),
    "cp4, more ranks than groups": (4, {"cp": 4, "micro_batch_size": 8}),
    "cp2 tp2": (4, {"cp": 2, "tp": 2, "micro_batch_size": 8}),
    "cp2 pp2": (4, {"cp": 2, "pp": 2, "micro_batch_size": 4}),
    "cp2 dp2 overlapped": (
        4,
        {**OVERLAPPED, "cp": 2, "micro_batch_size": 2},
    ),
    "cp2 recompute full": (2, {"cp": 2, "recompute": "full", "micro_batch_size": 4}),
    "tp2 pp2 vpp2": (4, {"tp": 2, "pp": 2, "vpp": 2, "micro_batch_size": 4}),
    "pp3 uneven": (
        3,
        {"pp": 3, "layers_per_stage": "1,2,1", "micro_batch_size": 2},
    ),
    "recompute a block": (
        1,
        {
            "recompute": "full",
            "recompute_method": "block",
            "recompute_num_layers": 2,
            "micro_batch_size": 4,
        },
    ),
    "recompute pairs": (1, {"recompute": "full", "recompute_num_layers": 2, "micro_batch_size": 4}),
    "micro-batch 4": (1, {"micro_batch_size": 4}),
    "recompute full": (1, {"recompute": "full"}),
    "recompute selective": (1, {"recompute": "selective", "micro_batch_size": 4}),
}
# Of the others each is a part of one of these, or a pair of what these show.
QUICK = (
    "tp2",
    "tp2 sending while it multiplies",
    "tp4, more ranks than groups",
    "pp2 vpp2",
    "pp2 uneven",
    "tp2 pp2 vpp2",
    "one rank, replicated optimizer",
    "dp2 overlapped",
    "dp2 pp2 vpp2 overlapped",
    "cp4, more ranks than groups",
    "cp2 dp2 overlapped",
    "recompute a block",
    "micro-batch 4",
    "recompute full",
)
STEPS = 10
RESUMES = [
    ("1x1", "1x1"),
    ("tp2 pp2", "1x1"),
    ("pp2 vpp2", "dp2"),
    ("dp4", "tp2 pp2 uneven"),
    ("dp2 replicated", "dp4"),
    ("cp2", "dp2"),
]
SLOW_RESUMES = [
    pytest.param(before, after, marks=pytest.mark.slow)
    for before, after in (
        ("dp2", "tp2"),
        ("dp2", "dp4"),
        ("dp2 replicated", "tp2 replicated"),
        ("dp2", "dp2 replicated"),
        ("dp2 overlapped", "dp2 overlapped"),
        ("dp2", "cp2 tp2"),
    )
]
RESUME_SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "1x1": (1, {}),
    "tp2": (2, {"tp": 2, "micro_batch_size": 4}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2, "micro_batch_size": 4}),
    "dp2": (2, {"micro_batch_size": 2}),
    "dp2 overlapped": (2, {**OVERLAPPED, "micro_batch_size": 2}),
    "dp4": (4, {}),
    "cp2": (2, {"cp": 2, "micro_batch_size": 4}),
    "cp2 tp2": (4, {"cp": 2, "tp": 2, "micro_batch_size": 8}),
    "dp2 replicated": (2, {"distributed_optimizer": False, "micro_batch_size": 2}),
    "tp2 replicated": (2, {"tp": 2, "distributed_optimizer": False, "micro_batch_size": 4}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2, "micro_batch_size": 2}),
    "tp2 pp2 uneven": (
        4,
        {"tp": 2, "pp": 2, "layers_per_stage": "1,3", "micro_batch_size": 4},
    ),
}


LOSSES, NORMS, WEIGHTS = 1e-5, 1e-4, 1e-4  # relative
ELEMENTS = 2e-5  # absolute; a step moves an element by up to 1e-2


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool) -> Trained:
    return ranks.run(1, train_steps, {}, 0, STEPS)[0]


def check_alike(found: Sequence[Trained], one_rank: Trained) -> None:
    """Checks that ranks saw the losses, norms and final weights of a run on one rank.

    A run that has resumed saw the last steps alone.
    """
    for rank in found:
        first = STEPS - len(rank.losses)
        assert rank.losses == pytest.approx(one_rank.losses[first:], rel=LOSSES)
        assert rank.grad_norms == pytest.approx(one_rank.grad_norms[first:], rel=NORMS)
    apart = distance(found, one_rank)
    assert apart.relative < WEIGHTS
    assert apart.absolute < ELEMENTS


def distance(found: Sequence[Trained], one_rank: Trained) -> Difference:
    """Returns how far the weights of a run are from those of a run on one rank."""
    weights, expected = (
        whole_weights([rank.pieces for rank in run], TINY) for run in (found, [one_rank])
    )
    return difference(weights, expected, weights_of(first_source()), TINY)


@pytest.mark.parametrize("sizes", mostly_slow(PARALLEL_SIZES, QUICK))
def test_all_parallel_sizes_train_alike(ranks: RankPool, one_rank: Trained, sizes: str) -> None:
    world_size, options = PARALLEL_SIZES[sizes]
    check_alike(ranks.run(world_size, train_steps, options, 0, STEPS), one_rank)


def test_the_tiny_model_learns(ranks: RankPool) -> None:
    # Random labels can't be predicted, but their uniform distribution can.
    [found] = ranks.run(1, train_steps, {}, 0, 20)
    assert found.losses[-1] < found.losses[0]
    assert all(norm > 0 for norm in found.grad_norms)


def test_a_step_less_shows_in_the_weights(ranks: RankPool, one_rank: Trained) -> None:
    found = ranks.run(1, train_steps, {}, 0, STEPS - 1)
    assert distance(found, one_rank).relative > 50 * WEIGHTS


def test_ranks_that_drift_apart_are_noticed(one_rank: Trained) -> None:
    key = next(iter(one_rank.pieces))
    other = one_rank.pieces | {key: np.nextafter(one_rank.pieces[key], np.float32(1))}
    with pytest.raises(AssertionError, match=f"ranks hold different copies of {key[0]}"):
        whole_weights([one_rank.pieces, other], TINY)


@pytest.mark.parametrize(("before", "after"), RESUMES + SLOW_RESUMES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    ranks: RankPool, one_rank: Trained, tmp_path: Path, before: str, after: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    world_size, options = RESUME_SIZES[before]
    found = ranks.run(world_size, train_steps, options, 0, STEPS // 2, tmp_path)
    assert_same(read_all(tmp_path), whole_weights([rank.pieces for rank in found], TINY))
    world_size, options = RESUME_SIZES[after]
    found = ranks.run(world_size, train_steps, options, STEPS // 2, STEPS, None, tmp_path)
    check_alike(found, one_rank)
