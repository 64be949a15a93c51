"""Steps whose loss is NaN, or that have nothing to train: all ranks skip and report them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm3cli.errors import DataError
from tests.support.ranks import RankPool
from tests.support.tiny import TINY, Samples, train_config

pytestmark = pytest.mark.dist

BAD = 17  # a sample of the third batch, of the second data parallel rank where there are two


class Poisoned(Samples):
    """Samples of which one has a loss of NaN."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        sample = super().__getitem__(index)
        if index == BAD:
            sample["loss_mask"] = sample["loss_mask"] * np.float32(np.nan)
        return sample


class Recorder:
    """Stands for Metrics and for the profiler, and remembers losses and events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.losses: list[float] = []

    def step(self, _state: Any, outcome: Any, *_rest: Any) -> None:
        self.losses.append(outcome.loss)

    def event(self, event: str, **details: Any) -> None:
        self.events.append((event, details))

    def stop(self, *_: Any) -> None:
        pass

    def begin(self, _iteration: int) -> None:
        pass

    end = close = begin


class TwicePoisoned(Poisoned):
    """Samples of which another one, of the fifth batch, has a loss of NaN, too."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return super().__getitem__(BAD if index == BAD + 16 else index)


class AllPoisoned(Poisoned):
    """Samples that all have a loss of NaN."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return super().__getitem__(BAD)


def train(
    options: dict[str, Any], save: Path, samples: type[Samples] = Poisoned
) -> tuple[list[float], list[Any], Any]:
    """Trains six steps with a poisoned sample; runs on a rank of the pool.

    Returns:
        The losses, the events, and the final state.
    """
    import torch

    from glm3cli.parallel.groups import open_grid
    from glm3cli.parallel.storage import find_storage
    from glm3cli.train.checkpointer import Checkpointer
    from glm3cli.train.loop import Trainer
    from glm3cli.train.progress.state import State
    from glm3cli.train.setup import TrainingParts
    from glm3cli.train.signals import StopFlag
    from tests.support.training import build

    options = {"train_iters": 6, "save": save, "save_interval": 1, **options}
    with open_grid(train_config(**options)) as grid:
        config, train_step, loader = build(options, grid, samples)
        recorder: Any = Recorder()
        (save / "companions").mkdir(parents=True, exist_ok=True)
        (save / "companions/tokenizer.model").touch()
        checkpointer = Checkpointer(
            save,
            TINY,
            save / "companions",
            save / "companions/tokenizer.model",
            None,
            0,
            False,
            find_storage(save),
        )
        parts = TrainingParts(None, train_step, loader, None)  # type: ignore[arg-type]
        state = State()
        stop = StopFlag(torch.device("cpu"))
        loop = Trainer(config, parts, state, recorder, checkpointer, recorder, stop)
        try:
            state = loop.run()
        except DataError as error:
            recorder.events.append(("error", {"message": error.message}))
        return recorder.losses, recorder.events, state


def skips(events: list[Any]) -> list[Any]:
    return [details for event, details in events if event == "skip"]


@pytest.mark.parametrize("ranks_and_options", [(1, {}), (2, {}), (2, {"dtype": "bf16", "pp": 2})])
def test_all_ranks_skip_the_same_step(
    ranks: RankPool, tmp_path: Path, ranks_and_options: tuple[int, dict[str, Any]]
) -> None:
    number, options = ranks_and_options
    for losses, events, state in ranks.run(number, train, options, tmp_path):
        assert np.isnan(losses).tolist() == [False, False, True, False, False, False]
        [skip] = skips(events)
        assert (skip["iteration"], skip["samples"]) == (3, "16 to 23")
        assert skip["reason"] == "loss is not a number"
        assert (state.iteration, state.skipped, state.nan) == (6, 1, 1)


def test_too_many_in_a_row_end_the_run(ranks: RankPool, tmp_path: Path) -> None:
    [(_, events, _)] = ranks.run(1, train, {"max_skipped": 1}, tmp_path)
    [error] = [details["message"] for event, details in events if event == "error"]
    assert error == (
        "1 steps in a row were skipped, the last one, 3, because its loss is not a number; its "
        "samples are 16 to 23"
    )


def test_too_many_that_are_not_in_a_row_do_not(ranks: RankPool, tmp_path: Path) -> None:
    [(losses, events, _)] = ranks.run(1, train, {"max_skipped": 2}, tmp_path, TwicePoisoned)
    assert np.isnan(losses).tolist() == [False, False, True, False, True, False]
    assert [event for event, _ in events].count("error") == 0


def test_a_run_that_has_changed_nothing_fails(ranks: RankPool, tmp_path: Path) -> None:
    [(losses, events, _)] = ranks.run(1, train, {"save_interval": None}, tmp_path, AllPoisoned)
    assert np.isnan(losses).all()
    [error] = [details["message"] for event, details in events if event == "error"]
    assert error == (
        "no step has changed the weights: the loss or the gradient of all 6 is not a number"
    )
    assert not list(tmp_path.glob("iter_*"))


@pytest.mark.parametrize("number", [1, 2])
def test_a_rollback_leaves_the_batch_out(ranks: RankPool, tmp_path: Path, number: int) -> None:
    options = {"rollback_on_nan": True}
    for losses, events, state in ranks.run(number, train, options, tmp_path):
        # Back to the checkpoint of step 2; step 3 is left out, and 4 to 6 go on from there.
        assert len(losses) == 6
        assert [event for event, _ in events if event in ("skip", "rollback")] == [
            "skip",
            "rollback",
        ]
        assert state.stepped_over == [(16, 24)]
        assert (state.iteration, state.consumed_samples, state.nan) == (6, 48, 1)
        assert np.isfinite(losses[3:]).all()


def gradient_is_seen() -> list[bool]:
    """Returns whether this rank finds the gradient finite, before and after rank 1's has a NaN."""
    import torch

    from glm3cli.parallel.groups import open_grid
    from tests.support.training import build

    with open_grid(train_config()) as grid:
        _, train_step, loader = build({}, grid)
        train_step.forward_backward(loader, 0)
        found = [train_step.is_gradient_finite()]
        if grid.rank == 1:
            gradient = train_step.chunks[0].buffers[0].grad_data
            gradient[0] = torch.nan
        return [*found, train_step.is_gradient_finite()]


def test_a_gradient_that_is_nan_on_one_rank_is_seen_by_all(ranks: RankPool) -> None:
    assert ranks.run(2, gradient_is_seen) == [[True, False], [True, False]]


class Untrained(Samples):
    """Samples without a token to train."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        sample = super().__getitem__(index)
        return {**sample, "loss_mask": np.zeros_like(sample["loss_mask"])}


def train_on_nothing(options: dict[str, Any]) -> tuple[bool, Any, float]:
    """Trains a step, and then one without a token to train.

    Returns:
        Whether the second has left weights, AdamW's state, schedule and loss scale as they were;
        its outcome; and the learning rate that is next.
    """
    import torch

    from glm3cli.parallel.groups import open_grid
    from glm3cli.train.setup import make_loader
    from tests.support.training import build

    def state() -> list[Any]:
        part = train_step.optimizer.chained_optimizers[0]
        tensors = [value for values in part.optimizer.state.values() for value in values.values()]
        weights = [weight for chunk in train_step.chunks for weight in chunk.parameters()]
        scale = train_step.optimizer.get_loss_scale()
        numbers = [train_step.scheduler.num_steps, float(scale)]
        found = [torch.as_tensor(value) for value in (*tensors, *weights, *numbers)]
        return [value.detach().clone() for value in found]

    options = {"train_iters": 4, "weight_decay": 0.5, "lr": 1e-2, **options}
    with open_grid(train_config(**options)) as grid:
        config, train_step, loader = build(options, grid)
        empty = make_loader(config, TINY, grid, Untrained(config.seq_length, 64))
        train_step.run(loader, 0)
        before = state()
        outcome = train_step.run(empty, config.global_batch_size)
        same = all(torch.equal(*pair) for pair in zip(before, state(), strict=True))
        return same, outcome, float(train_step.scheduler.get_lr({}))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_step_without_a_token_to_train_changes_nothing(ranks: RankPool, dtype: str) -> None:
    for same, outcome, next_lr in ranks.run(2, train_on_nothing, {"dtype": dtype}):
        assert same
        assert outcome.skipped
        assert outcome.reason == "samples have no token to train"
        assert np.isnan(outcome.loss)
        assert (outcome.num_tokens, outcome.grad_norm) == (0, 0)
        assert not outcome.is_nan
        assert not outcome.is_overflow
        assert next_lr == outcome.lr
