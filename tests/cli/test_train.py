"""`glm3 pretrain` and `glm3 finetune` as a user runs them: whole runs, and how they go on."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.checkpoint.names import slots
from glm3cli.checkpoint.random import RandomSource
from glm3cli.device import require_active
from tests.support.checkpoints import assert_same, read_all
from tests.support.project import (
    Ended,
    Project,
    call,
    end,
    events,
    records,
    start,
    steps,
)
from tests.support.samples import write_instructions
from tests.support.train_command import (
    LR,
    checkpoints,
    has_steps,
    losses,
    options,
    succeed,
    wait_until,
)

FIELDS = {
    "iteration",
    "consumed_samples",
    "consumed_tokens",
    "loss",
    "lr",
    "grad_norm",
    "loss_scale",
    "step_time",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "unpadded_tokens_per_second",
    "trained_tokens_per_second",
    "tflops_per_device",
    "tflops_per_device_causal",
    "mfu",
    "mfu_causal",
    "skipped",
    "nan",
    "peak_memory_bytes",
    "data_wait_time",
    "forward_backward_time",
    "optimizer_time",
    "other_time",
}


def test_what_a_run_leaves(first: tuple[Path, Ended]) -> None:
    run, ended = first
    assert ended.out == f"{run / 'iter_0000006'}\n"
    assert "iteration        6/       6 | consumed samples           24 |" in ended.err
    names = {path.name for path in run.iterdir() if path.name != ".lock"}
    assert names == {"run.yaml", "metrics.jsonl", "report.html", "iter_0000003", "iter_0000006"}
    kinds = [record["event"] for record in records(run) if "event" in record]
    assert kinds == ["start", "operators", "save", "save", "stop"]
    for number, record in enumerate(steps(run), 1):
        assert record.keys() == FIELDS
        assert record["iteration"] == number
        assert record["consumed_samples"] == number * 4
        assert record["consumed_tokens"] == number * 4 * 16
        assert record["lr"] == LR
        assert (record["loss_scale"], record["skipped"], record["nan"]) == (1, 0, 0)
        assert record["grad_norm"] > 0
        rate = record["tokens_per_second_per_device"]
        assert rate == pytest.approx(64 / record["step_time"])
    # Full precision: a number that was rounded for people would come back from its own rounding.
    assert all(float(f"{loss:.7e}") != loss for loss in losses(run)[:2])


def test_the_loss_falls_from_chance(project: Project, tmp_path: Path) -> None:
    wide = options(project, tmp_path / "run", train_iters=40, lr=1e-2, save_interval=None)
    succeed(*wide)
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(math.log(1024), abs=0.5)
    assert sum(found[-5:]) / 5 < found[0] - 1


def test_the_same_command_goes_on(run: Path, project: Project, first: tuple[Path, Ended]) -> None:
    ended = succeed(*options(project, run, train_iters=8, lr=5e-4))
    assert ended.out == f"{run / 'iter_0000008'}\n"
    assert [record["iteration"] for record in steps(run)] == list(range(1, 9))
    [resumed] = events(run, "resume")
    assert resumed["path"] == str(run / "iter_0000006")
    assert resumed["iteration"] == 6
    assert resumed["not_restored"] == "nothing"
    # The learning rate is that of the new command.
    assert [record["lr"] for record in steps(run)[5:]] == [LR, 5e-4, 5e-4]
    assert yaml.safe_load((run / "run.yaml").read_text())["train_iters"] == 8
    assert losses(run)[:6] == losses(first[0])


def test_a_schedule_of_the_new_command_wins(run: Path, project: Project) -> None:
    changes = {"train_iters": 8, "lr_decay_style": "cosine", "min_lr": 1e-4}
    succeed(*options(project, run, **changes))
    expected = [1e-4 + 0.5 * (1 + math.cos(math.pi * i / 8)) * (LR - 1e-4) for i in (6, 7)]
    assert [record["lr"] for record in steps(run)[6:]] == pytest.approx(expected, rel=1e-9)


def test_the_optimizer_goes_by_the_new_learning_rate(run: Path, project: Project) -> None:
    """The new rate is not only logged: where it is almost 0, the weights stay."""
    succeed(*options(project, run, train_iters=8, lr=1e-12))
    before, after = read_all(run / "iter_0000006"), read_all(run / "iter_0000008")
    for name, weight in before.items():
        assert torch.allclose(after[name], weight, rtol=0, atol=1e-9), name


def test_a_finished_run_is_left_alone(run: Path, project: Project) -> None:
    before = steps(run)
    ended = succeed(*options(project, run))
    assert ended.out == f"{run / 'iter_0000006'}\n"
    assert steps(run) == before


def test_run_yaml_makes_the_same_run_again(first: tuple[Path, Ended], tmp_path: Path) -> None:
    run = first[0]
    succeed("pretrain", "--config", run / "run.yaml", "--save", tmp_path / "again")
    assert losses(tmp_path / "again") == losses(run)
    ours, theirs = (
        yaml.safe_load((folder / "run.yaml").read_text()) for folder in (run, tmp_path / "again")
    )
    assert theirs.pop("save") == str(tmp_path / "again")
    assert ours.pop("save") == str(run)
    assert ours == theirs


def test_a_new_run_in_a_used_folder_is_refused(run: Path, project: Project) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    ended = call(*options(project, run, resume="never"))
    assert ended.code == 2
    assert f"--save {run} already holds iter_0000006" in ended.err
    assert "--resume auto" in ended.err
    assert checkpoints(run) == ["iter_0000003", "iter_0000006"]
    assert (run / "metrics.jsonl").read_bytes() == before


def test_going_on_from_a_given_checkpoint_repeats_the_rest(
    first: tuple[Path, Ended], project: Project, tmp_path: Path
) -> None:
    run, again = first[0], tmp_path / "again"
    succeed(*options(project, again, resume=run / "iter_0000003"))
    assert [record["iteration"] for record in steps(again)] == [4, 5, 6]
    assert losses(again) == losses(run)[3:]
    assert_same(read_all(again), read_all(run))


@pytest.mark.parametrize("name", [".", "iter_0000003"])
def test_runs_and_checkpoints_are_models(
    first: tuple[Path, Ended], project: Project, tmp_path: Path, name: str
) -> None:
    model = first[0] / name
    weights = read_all(model)
    assert not torch.equal(
        weights["transformer.output_layer.weight"],
        read_all(project.model)["transformer.output_layer.weight"],
    )
    succeed("convert", "mg2hf", model, tmp_path / "hf")
    assert_same(read_all(tmp_path / "hf"), weights)
    asked = ("--prompt", "The lake", "--greedy", "--max-new-tokens", 5, "--json")
    ours, theirs = (
        json.loads(succeed("generate", "--model", folder, *asked).out)["results"]
        for folder in (model, tmp_path / "hf")
    )
    assert ours == theirs
    assert len(ours[0]["token_ids"]) == 5


def test_the_tokenizer_of_the_run_stays_with_it(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.model, tmp_path / "model")
    (tmp_path / "model/tokenizer.model").unlink()
    other = tmp_path / "other"
    other.mkdir()
    (other / "added_tokens.json").write_text("{}")
    (project.tokenizer / "tokenizer.model").rename(other / "tokenizer.model")
    try:
        changes = {"model": tmp_path / "model", "tokenizer": other / "tokenizer.model"}
        succeed(*options(project, tmp_path / "run", train_iters=1, **changes))
    finally:
        (other / "tokenizer.model").rename(project.tokenizer / "tokenizer.model")
    assert (tmp_path / "run/iter_0000001/added_tokens.json").read_text() == "{}"
    asked = ("--prompt", "The lake", "--greedy", "--max-new-tokens", 1)
    succeed("generate", "--model", tmp_path / "run", *asked)


def test_from_scratch(project: Project, tmp_path: Path) -> None:
    changes = {
        "model": None,
        "from_scratch": True,
        "model_config": project.model / "config.json",
        "tokenizer": project.tokenizer,
        "train_iters": 1,
    }
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        succeed(*options(project, tmp_path / name, seed=seed, **changes))
    assert losses(tmp_path / "one") == losses(tmp_path / "same")
    assert losses(tmp_path / "one") != losses(tmp_path / "other")
    assert losses(tmp_path / "one")[0] == pytest.approx(math.log(1024), abs=0.1)
    succeed("convert", "inspect", tmp_path / "one")
    # Adam's first step changes no weight by much more than the learning rate.
    trained = open_source(tmp_path / "other")
    drawn = RandomSource(trained.model, seed=2, std=0.01)
    for slot in slots(trained.model):
        assert (trained.read(*slot) - drawn.read(*slot)).abs().max() < 2 * LR


def test_deterministic_asks_the_device_before_the_ranks_join(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HCCL reads its setting when it starts."""
    joined = []
    device = require_active()
    monkeypatch.setattr(device, "make_deterministic", lambda: joined.append(dist.is_initialized()))
    succeed(*options(project, tmp_path / "run", deterministic=True, train_iters=1))
    assert joined == [False]
    succeed(*options(project, tmp_path / "other", train_iters=1))
    assert joined == [False]


def test_finetuning_a_run_with_validation(
    first: tuple[Path, Ended], project: Project, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"seq_length": 32, "train_iters": 4, "save_interval": None}
    watched = {"eval_interval": 2, "eval_iters": 2}
    succeed(*options(project, tmp_path / "a", "finetune", model=first[0], **changes, **watched))
    checks = [record for record in records(tmp_path / "a") if "validation_loss" in record]
    assert [record["iteration"] for record in checks] == [2, 4]
    assert all(record.keys() == {"iteration", "validation_loss"} for record in checks)
    assert checks[1]["validation_loss"] < checks[0]["validation_loss"] < 10
    # Validation changes nothing, and a run is what its export is.
    succeed("convert", "mg2hf", first[0], tmp_path / "hf")
    succeed(*options(project, tmp_path / "b", "finetune", model=tmp_path / "hf", **changes))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    succeed(*options(project, tmp_path / "c", "finetune", **changes))
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_a_validation_reads_as_many_batches_as_asked(project: Project, tmp_path: Path) -> None:
    found = []
    for number in (1, 2):
        run = tmp_path / str(number)
        changes = {"train_iters": 1, "lr": 1e-12, "split": "1,1,0", "save_interval": None}
        succeed(*options(project, run, **changes, eval_interval=1, eval_iters=number))
        found += [line["validation_loss"] for line in records(run) if "validation_loss" in line]
    assert found[0] != found[1] == pytest.approx(found[0], rel=0.1)


def test_tensorboard(project: Project, tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    run = tmp_path / "run"
    changes = {"train_iters": 3, "save_interval": None, "eval_interval": 3, "eval_iters": 1}
    succeed(*options(project, run, report_to="tensorboard", **changes))
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(i, pytest.approx(loss)) for i, loss in enumerate(losses(run), 1)]
    assert [event.step for event in events.Scalars("validation_loss")] == [3]


def test_keep_last(project: Project, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"save_interval": 1, "keep_last": 2}
    succeed(*options(project, run, train_iters=4, **changes))
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == [
        "iter_0000003",
        "iter_0000004",
    ]
    # One that is written again replaces the one that has its name.
    changes |= {"lr": 1e-5, "resume": run / "iter_0000003"}
    before = read_all(run)
    succeed(*options(project, run, train_iters=4, **changes))
    assert checkpoints(run) == ["iter_0000003", "iter_0000004"]
    assert any(
        not torch.equal(old, new)
        for old, new in zip(before.values(), read_all(run).values(), strict=True)
    )
    # The run is the checkpoint that was just written, whatever lies there already.
    changes = {"save_interval": 10, "keep_last": 1}
    (run / "iter_0000004").rename(run / "iter_0000009")
    aside = [run / "aside_iter_0000009", run / "aside_iter_0000009-2"]
    aside[0].mkdir()
    succeed(*options(project, run, train_iters=4, resume=run / "iter_0000003", **changes))
    assert checkpoints(run) == ["iter_0000004"]
    assert [event["paths"] for event in events(run, "set_aside")] == [str(aside[1])]
    assert (aside[1] / "metadata.json").exists()
    assert_same(read_all(run), read_all(run / "iter_0000004"))


def test_numbers_that_are_none(project: Project, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"train_iters": 3, "save_interval": None, "lr": 1e30, "clip_grad": 0}
    ended = call(*options(project, run, **changes))
    assert ended.code == 0, ended.err

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    last = [record for record in found if "loss" in record][-1]
    assert last["loss"] is None
    assert last["nan"] == 2


def test_skipped_steps_are_events_and_a_run_of_them_can_be_saved(
    project: Project, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes = {"dtype": "fp16", "initial_loss_scale": 2**30, "train_iters": 3}
    succeed(*options(project, run, **changes))
    assert [(e["iteration"], e["loss_scale"]) for e in events(run, "skip")] == [
        (1, 2**30),
        (2, 2**30),
        (3, 2**29),
    ]
    assert [record["skipped"] for record in steps(run)] == [1, 2, 3]
    assert_same(read_all(run), {k: v.half() for k, v in read_all(project.model).items()})
    succeed(*options(project, run, **changes | {"train_iters": 4}))
    assert steps(run)[-1]["loss_scale"] == 2**28


def test_samples_whose_answers_are_beyond_the_sequence_length_are_left_out(
    project: Project, tmp_path: Path
) -> None:
    run, late = tmp_path / "run", [([5] * 70, [6, 7])] * 40
    changes = {"train_iters": 2, "split": "1,1,0", "eval_interval": 2, "eval_iters": 1}
    data = write_instructions(tmp_path / "data", late)
    ended = call(*options(project, run, "finetune", data=data, **changes))
    assert ended.code == 3, ended.err
    assert "none of its 20 samples for training has a token to train" in ended.err
    data = write_instructions(tmp_path / "data", [*late, ([5], [6] * 70), ([5], [6])] * 2)
    ended = succeed(*options(project, run, "finetune", data=data, **changes))
    assert "80 samples have nothing to train on" in ended.err + ended.out
    assert "2 samples are longer than --seq-length" in ended.err + ended.out
    assert [step["skipped"] for step in steps(run)] == [0, 0]


def test_dry_run(project: Project, tmp_path: Path) -> None:
    changes = {"nproc": 8, "tp": 2, "pp": 2, "dry_run": True, "train_iters": 1000}
    ended = succeed(*options(project, tmp_path / "run", **changes))
    assert "ranks: 8 = tp 2 x pp 2 x dp 2" in ended.out
    assert "1,000 steps, 64,000 tokens" in ended.out
    assert "in 1 micro-batches of 2 x 16 tokens" in ended.out
    assert "stage 0: weights" in ended.out
    assert "stage 1: weights" in ended.out
    assert "checkpoint: " in ended.out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_signal_to_all_its_processes_saves_and_the_next_run_goes_on(
    project: Project, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    # A checkpoint comes first, for the process that megatron-core keeps from then on.
    endless = options(project, run, train_iters=100_000, save_interval=2)
    process = start(log, *endless, own_group=True)
    wait_until(lambda: has_steps(run, 4), process)
    os.killpg(process.pid, signal.SIGTERM)
    ended = end(process, log)
    assert ended.code == 143, ended.err
    last = steps(run)[-1]["iteration"]
    assert f"error: stopped at iteration {last} of 100000 and saved" in ended.err
    assert checkpoints(run)[-1] == f"iter_{last:07d}"
    assert [event["number"] for event in events(run, "signal")] == [signal.SIGTERM]
    assert "stopped by signal 15" in (run / "report.html").read_text("utf-8")
    succeed(*options(project, run, train_iters=last + 1))
    assert events(run, "resume")[0]["iteration"] == last
    assert [record["iteration"] for record in steps(run)] == list(range(1, last + 2))


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_train_alike_and_stop_together(
    first: tuple[Path, Ended], project: Project, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    # Saving at every step leaves time for the signal; as many samples as there are, once.
    changes = {"train_iters": 40, "save_interval": 1, "keep_last": 1, "nproc": 2, "tp": 2}
    process = start(log, *options(project, run, **changes))
    wait_until(lambda: has_steps(run, 6), process)
    process.send_signal(signal.SIGTERM)
    ended = end(process, log)
    assert ended.code == 143, ended.err
    assert "Traceback" not in ended.err
    assert ended.err.count("error: ") == 1
    last = steps(run)[-1]["iteration"]
    assert checkpoints(run) == [f"iter_{last:07d}"]
    assert losses(run)[:6] == pytest.approx(losses(first[0]), rel=1e-5)
    succeed(*options(project, run, train_iters=last + 1))
    assert events(run, "resume")[0]["iteration"] == last
