"""Training in 16 bits is close to fp32, scales fp16's loss, and resumes to the last digit.

The tolerance of losses against fp32 is one rounding, 2**-8 (bf16) or 2**-11 (fp16) of their size:
the loss is a mean over more than a hundred tokens, whose logits have random rounding errors of that
size. A wrong scale of loss or gradient is far outside of it within ten steps of AdamW.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import RankPool
from tests.support.slow import mostly_slow
from tests.support.tiny import train_config
from tests.support.training import build, train_steps

pytestmark = pytest.mark.dist

RANKS = {"1x1": 1, "dp2": 2}
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}
STEPS = 10
OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16"},
    # The default scale, at which the tiny model's gradients stay in fp16's range.
    "fp16": {"dtype": "fp16", "initial_loss_scale": 4096.0},
}
# Here they overflow, until the scale has been halved a few times. There is no warm-up, so that all
# other steps move the weights.
LARGE = 2.0**21
TOO_LARGE: dict[str, Any] = {"dtype": "fp16", "initial_loss_scale": LARGE, "lr_warmup_iters": 0}


@dataclass(frozen=True)
class Step:
    """What a step did.

    Attributes:
        loss: The mean loss of the global batch.
        loss_scale: The factor of the loss in the backward pass.
        skipped: Whether the weights stayed as they were.
        num_skipped: The number of steps that the run has skipped so far.
        change: The largest change of an element of the first weight.
    """

    loss: float
    loss_scale: float
    skipped: bool
    num_skipped: int
    change: float


def run(
    options: dict[str, Any],
    start: int,
    stop: int,
    save: Path | None = None,
    load: Path | None = None,
) -> list[Step]:
    """Trains the steps start..stop as the loop does, and looks at the weights; runs on the pool.

    A checkpoint is loaded before, or saved after, if one is given.
    """
    import torch

    from glm3cli.checkpoint.run.resume import load_training, save_request
    from glm3cli.parallel.groups import open_grid
    from glm3cli.train.progress.state import State

    with open_grid(train_config(**options)) as grid:
        config, train_step, loader = build(options, grid)
        state = State()
        parts = (train_step.chunks, train_step.optimizer, train_step.scheduler)
        if load is not None:
            state = State.from_dict(load_training(load, *parts, grid)[0])
        assert state.iteration == start
        weight = next(train_step.chunks[0].parameters())
        assert weight.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[config.dtype]
        found = []
        for _ in range(start, stop):
            before = weight.detach().clone()
            outcome = train_step.run(loader, state.consumed_samples)
            state.advance(outcome, config.global_batch_size, config.seq_length)
            change = float((weight.detach() - before).abs().max())
            found.append(
                Step(outcome.loss, outcome.loss_scale, outcome.skipped, state.skipped, change)
            )
        if save is not None:
            save_request(save, *parts, state.to_dict(), grid).execute_sync()
        return found


@pytest.fixture(scope="module")
def exact(ranks: RankPool) -> list[float]:
    """Returns the losses of the steps in fp32."""
    return ranks.run(1, train_steps, {}, 0, STEPS)[0].losses


@pytest.fixture(scope="module")
def whole(ranks: RankPool) -> dict[tuple[str, str], list[list[Step]]]:
    """Returns the steps of every rank, without a stop, by type and parallel sizes."""
    return {
        (dtype, sizes): ranks.run(number, run, OPTIONS[dtype], 0, STEPS)
        for dtype in ROUNDING
        for sizes, number in RANKS.items()
    }


@pytest.mark.parametrize("sizes", RANKS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_losses_are_close_to_fp32(
    whole: dict[tuple[str, str], list[list[Step]]], exact: list[float], dtype: str, sizes: str
) -> None:
    for steps in whole[dtype, sizes]:
        found = [step.loss for step in steps]
        assert found == pytest.approx(exact, rel=ROUNDING[dtype])
        assert found != exact
        assert all(step.change > 0 for step in steps[1:])  # the warm-up starts at 0


@pytest.mark.parametrize("sizes", RANKS)
def test_the_loss_scale_is_fp16s(
    ranks: RankPool, whole: dict[tuple[str, str], list[list[Step]]], sizes: str
) -> None:
    for [step] in ranks.run(RANKS[sizes], run, {"dtype": "fp16"}, 0, 1):
        assert step.loss_scale == 4096
    for steps in whole["fp16", sizes]:
        assert {step.loss_scale for step in steps} == {4096}
    for steps in whole["bf16", sizes]:
        assert {step.loss_scale for step in steps} == {1}


@pytest.mark.parametrize("sizes", RANKS)
def test_an_overflow_is_skipped_and_counted(
    ranks: RankPool, exact: list[float], sizes: str
) -> None:
    for steps in ranks.run(RANKS[sizes], run, TOO_LARGE, 0, STEPS):
        skipped = [step.skipped for step in steps]
        assert 2 <= sum(skipped) < STEPS - 2
        counts = [sum(skipped[: i + 1]) for i in range(STEPS)]
        assert [step.num_skipped for step in steps] == counts
        # The weights stay where they are; every overflow but the first (hysteresis) halves.
        assert [step.change > 0 for step in steps] == [not skip for skip in skipped]
        before = [0, *counts[:-1]]
        assert [step.loss_scale for step in steps] == [
            LARGE / 2 ** max(0, count - 1) for count in before
        ]
        assert steps[0].loss == pytest.approx(exact[0], rel=ROUNDING["fp16"])


@pytest.mark.parametrize("sizes", RANKS)
@pytest.mark.parametrize("dtype", mostly_slow(ROUNDING, ["bf16"]))
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_digit(
    ranks: RankPool,
    whole: dict[tuple[str, str], list[list[Step]]],
    tmp_path: Path,
    dtype: str,
    sizes: str,
) -> None:
    number, options = RANKS[sizes], OPTIONS[dtype]
    ranks.run(number, run, options, 0, 4, tmp_path)
    assert ranks.run(number, run, options, 4, STEPS, None, tmp_path) == [
        steps[4:] for steps in whole[dtype, sizes]
    ]


@pytest.mark.parametrize(
    "options", mostly_slow([{}, {"distributed_optimizer": False}], [{}]), ids=str
)
def test_a_resumed_run_keeps_its_loss_scale(
    ranks: RankPool, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Every step so far was skipped, so that the optimizer has no moments yet."""
    options = {**TOO_LARGE, **options}
    [expected] = ranks.run(1, run, options, 0, STEPS)
    [before] = ranks.run(1, run, options, 0, 2, tmp_path)
    assert all(step.skipped for step in before)
    assert ranks.run(1, run, options, 2, STEPS, None, tmp_path) == [expected[2:]]
    assert expected[2].loss_scale < expected[0].loss_scale
