"""`glm3 pretrain` and `glm3 finetune` from the outside: whole runs, and every way to go wrong."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.support.checkpoints import assert_same, read_all
from tests.support.project import (
    Ended,
    Project,
    call,
    end,
    environment,
    events,
    glm3,
    records,
    start,
    steps,
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
    "tflops_per_device",
    "mfu",
    "skipped",
    "nan",
    "peak_memory_bytes",
}
LR = 1e-3


def options(project: Project, save: Path, command: str = "pretrain", **changes: Any) -> list[Any]:
    """A command of six steps whose learning rate stays, so that its length changes no step."""
    values = {
        "model": project.model,
        "data": project.text if command == "pretrain" else project.task,
        "save": save,
        "train_iters": 6,
        "seq_length": 16,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "dtype": "fp32",
        "device": "cpu",
        "lr": LR,
        "lr_decay_style": "constant",
        "save_interval": 3,
        **changes,
    }
    given = {name.replace("_", "-"): value for name, value in values.items() if value is not None}
    return [
        command,
        *(x for name, value in given.items() for x in flag(f"--{name}", value)),
    ]


def flag(name: str, value: Any) -> list[Any]:
    return [name] if value is True else [name, value]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in steps(run)]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("iter_*"))


def succeed(*arguments: Any) -> Ended:
    ended = call(*arguments)
    assert ended.code == 0, ended.err
    return ended


@pytest.fixture(scope="module")
def first(project: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The run that most tests look at, made by a process of its own; don't write to it."""
    folder = tmp_path_factory.mktemp("first")
    ended = glm3(folder / "log", *options(project, folder / "run"))
    assert ended.code == 0, ended.err
    return folder / "run", ended


@pytest.fixture
def run(first: tuple[Path, Ended], tmp_path: Path) -> Path:
    """A copy of that run."""
    shutil.copytree(first[0], tmp_path / "run")
    return tmp_path / "run"


def test_what_a_run_leaves(first: tuple[Path, Ended]) -> None:
    run, ended = first
    assert ended.out == f"{run / 'iter_0000006'}\n"
    assert "iteration        6/       6 | consumed samples           24 |" in ended.err
    names = {path.name for path in run.iterdir()}
    assert names == {"run.yaml", "metrics.jsonl", "iter_0000003", "iter_0000006"}
    told = [record["event"] for record in records(run) if "event" in record]
    assert told == ["start", "save", "save", "stop"]
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
    # Of the learning rate, the new command's settings count.
    assert [record["lr"] for record in steps(run)[5:]] == [LR, 5e-4, 5e-4]
    assert yaml.safe_load((run / "run.yaml").read_text())["train_iters"] == 8
    assert losses(run)[:6] == losses(first[0])


def test_a_schedule_of_the_new_command_wins(run: Path, project: Project) -> None:
    changes = {"train_iters": 8, "lr_decay_style": "cosine", "min_lr": 1e-4}
    succeed(*options(project, run, **changes))
    expected = [1e-4 + 0.5 * (1 + math.cos(math.pi * i / 8)) * (LR - 1e-4) for i in (6, 7)]
    assert [record["lr"] for record in steps(run)[6:]] == pytest.approx(expected, rel=1e-9)


def test_the_optimizer_goes_by_the_new_learning_rate(run: Path, project: Project) -> None:
    """Not only what is logged: at next to none, the weights stay."""
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
    (project.tokenizer / "tokenizer.model").rename(tmp_path / "other.model")
    try:
        changes = {"model": tmp_path / "model", "tokenizer": tmp_path / "other.model"}
        succeed(*options(project, tmp_path / "run", train_iters=1, **changes))
    finally:
        (tmp_path / "other.model").rename(project.tokenizer / "tokenizer.model")
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
    # A checkpoint that was just written is never removed, whatever lies there already.
    changes = {"save_interval": 10, "keep_last": 1}
    (run / "iter_0000004").rename(run / "iter_0000009")
    succeed(*options(project, run, train_iters=4, resume=run / "iter_0000003", **changes))
    assert checkpoints(run) == ["iter_0000004", "iter_0000009"]


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


def wait_for_steps(run: Path, number: int, process: subprocess.Popen[bytes]) -> None:
    """Waits until a started run has done so many steps."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(steps_so_far(run)) < number:
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, "the run doesn't start"
        time.sleep(0.05)


def steps_so_far(run: Path) -> list[str]:
    text = (run / "metrics.jsonl").read_text("utf-8")
    return [line for line in text.split("\n")[:-1] if '"loss"' in line]


@pytest.mark.slow
def test_a_signal_to_all_its_processes_saves_and_the_next_run_goes_on(
    project: Project, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    # A checkpoint comes first, for the process that megatron-core keeps from then on.
    endless = options(project, run, train_iters=100_000, save_interval=2)
    process = start(log, *endless, own_group=True)
    wait_for_steps(run, 4, process)
    os.killpg(process.pid, signal.SIGTERM)
    ended = end(process, log)
    assert ended.code == 143, ended.err
    last = steps(run)[-1]["iteration"]
    assert f"error: stopped at iteration {last} of 100000 and saved" in ended.err
    assert checkpoints(run)[-1] == f"iter_{last:07d}"
    assert [event["number"] for event in events(run, "signal")] == [signal.SIGTERM]
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
    wait_for_steps(run, 6, process)
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


def write_bad_task(prefix: Path, num_rows: int = 40) -> Path:
    """Instructions; the second sample of the run alone has a token beyond the vocabulary."""
    order = np.arange(num_rows)
    np.random.RandomState(1234).shuffle(order)
    for key in ("input_ids", "attention_mask", "labels"):
        name = f"{prefix}_packed_{key}_document"
        builder = IndexedDatasetBuilder(f"{name}.bin", dtype=np.int32)
        for row in range(num_rows):
            tokens = torch.full((10,), 1 if key == "attention_mask" else 5)
            if key != "attention_mask" and row == order[1]:
                tokens[4] = 5000
            builder.add_document(tokens, [10])
        builder.finalize(f"{name}.idx")
    return prefix


@pytest.mark.slow
@pytest.mark.dist
def test_the_error_of_any_rank_reaches_the_user_once(project: Project, tmp_path: Path) -> None:
    data = write_bad_task(tmp_path / "bad")
    changes = {"data": data, "split": "1,0,0", "micro_batch_size": 1, "global_batch_size": 2}
    arguments = options(project, tmp_path / "run", "finetune", nproc=2, **changes)
    ended = glm3(tmp_path / "log", *arguments)
    assert ended.code == 3, ended.err
    sentence = "error: sample 1 has token id 5000, but the model's vocabulary has 1024 entries"
    assert ended.err.count(sentence) == 1
    assert ended.err.count("error: ") == 1
    assert ended.err.count("hint: ") == 1
    assert not checkpoints(tmp_path / "run")


@dataclass(frozen=True)
class Case:
    """A wrong command: what is changed, how it ends, and what the user reads."""

    changes: Callable[[Project, Path], dict[str, Any]]
    code: int
    error: str
    hint: str
    command: str = "pretrain"


def edited(project: Project, folder: Path, **changes: Any) -> Path:
    """A model folder with another config.json; None removes a key."""
    model = folder / "edited"
    shutil.copytree(project.model, model, dirs_exist_ok=True)
    values = json.loads((model / "config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (model / "config.json").write_text(json.dumps(kept))
    return model


def without_tokenizer(project: Project, folder: Path) -> Path:
    model = edited(project, folder)
    (model / "tokenizer.model").unlink()
    return model


def file_in(folder: Path, text: str = "") -> Path:
    (folder / "file").write_text(text)
    return folder / "file"


SCRATCH: dict[str, Any] = {"model": None, "from_scratch": True, "model_config": "tiny"}
EARLY = {
    "missing model": Case(
        lambda p, t: {"model": t / "none"}, 3, "none does not exist", "give a model folder"
    ),
    "folder without weights": Case(
        lambda p, t: {"model": p.tokenizer}, 3, "holds no weights", "training run"
    ),
    "missing data": Case(
        lambda p, t: {"data": p.folder / "text"},
        3,
        "text.idx does not exist",
        "pretrain --data {folder}/text_text_document",
    ),
    "missing data, nothing near": Case(
        lambda p, t: {"data": t / "none"}, 3, "none.idx does not exist", "glm3 preprocess"
    ),
    "instructions for pretrain": Case(
        lambda p, t: {"data": p.task},
        3,
        "task.idx does not exist",
        "finetune --data {folder}/task\n",
    ),
    "text for finetune": Case(
        lambda p, t: {"data": p.text},
        3,
        "text_text_document_packed_input_ids_document.idx does not exist",
        "pretrain --data {folder}/text_text_document\n",
        "finetune",
    ),
    "weights for some data": Case(
        lambda p, t: {"data": f"2:{p.text}", "data-path": p.text},
        2,
        "some have a weight",
        "for none",
    ),
    "tp": Case(
        lambda p, t: {"tp": 3, "nproc": 3},
        2,
        "num_attention_heads 4 is not divisible by --tp 3",
        "use --tp 1, 2 or 4",
    ),
    "pp": Case(
        lambda p, t: {"pp": 3, "nproc": 3},
        2,
        "num_layers 2 is not divisible by --pp 3",
        "pp x vpp = 1 or 2",
    ),
    "ranks": Case(
        lambda p, t: {"tp": 2, "nproc": 3}, 2, "3 rank(s) can't hold --tp 2", "--nproc 2"
    ),
    "too few ranks": Case(
        lambda p, t: {"tp": 2, "pp": 2}, 2, "1 rank(s) can't hold --tp 2 x --pp 2", "--nproc 4"
    ),
    "global batch": Case(
        lambda p, t: {"global_batch_size": 5}, 2, "--global-batch-size 5", "use a multiple of 2"
    ),
    "sequence": Case(
        lambda p, t: {"seq_length": 15, "tp": 2, "nproc": 2}, 2, "--seq-length 15", "use a multiple"
    ),
    "two starts": Case(
        lambda p, t: {"from_scratch": True, "model_config": "tiny"},
        2,
        "give either --model MODEL or --from-scratch",
        "--help",
    ),
    "no start": Case(lambda p, t: {"model": None}, 2, "give either --model MODEL", "--help"),
    "no shape": Case(
        lambda p, t: {"model": None, "from_scratch": True}, 2, "needs --model-config", "--help"
    ),
    "missing shape": Case(
        lambda p, t: SCRATCH | {"model_config": t / "none", "tokenizer": p.tokenizer},
        3,
        "none does not exist",
        "config.json",
    ),
    "no tokenizer to start from": Case(
        lambda p, t: SCRATCH, 2, "no model folder to take the tokenizer from", "give --tokenizer"
    ),
    "missing tokenizer": Case(
        lambda p, t: {"tokenizer": t / "none"}, 3, "none does not exist", "tokenizer.model"
    ),
    "model without tokenizer": Case(
        lambda p, t: {"model": without_tokenizer(p, t)},
        3,
        "tokenizer.model does not exist",
        "give --tokenizer",
    ),
    "missing field": Case(
        lambda p, t: {"model": edited(p, t, hidden_size=None)},
        3,
        "config.json lacks hidden_size",
        "take the config.json",
    ),
    "other family": Case(
        lambda p, t: {"model": edited(p, t, model_type="llama")},
        3,
        "is of the family 'llama'",
        "glm3 takes ChatGLM2 and ChatGLM3",
    ),
    "save is a file": Case(lambda p, t: {"save": file_in(t)}, 2, "file is a file", "give a folder"),
    "save below a file": Case(
        lambda p, t: {"save": file_in(t) / "run"}, 2, "file is a file", "give a folder"
    ),
    "learning rates": Case(
        lambda p, t: {"min_lr": 1}, 2, "--min-lr 1.0 is above --lr 0.001", "--help"
    ),
    "no length": Case(lambda p, t: {"train_iters": None}, 2, "--train-iters is missing", "--help"),
    "unknown key": Case(
        lambda p, t: {"config": file_in(t, "seq_lenth: 3")},
        2,
        "did you mean 'seq_length'",
        "--help",
    ),
}
# Runs many wrong commands in one process, which stays small as long as nothing heavy is imported.
PROGRAM = """
import contextlib, io, json, sys
from glm3cli.cli.app import main
ended = []
for arguments in json.load(sys.stdin):
    sys.argv, out, err, code = ["glm3", *arguments], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as error:
            code = error.code
    heavy = sorted({"torch", "numpy", "megatron", "pyarrow"} & set(sys.modules))
    ended.append([code, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def early(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[Any]]]:
    """How each early case ends, and the folder that it was given."""
    folders = {name: tmp_path_factory.mktemp("case") for name in EARLY}
    commands = [
        [
            str(argument)
            for argument in options(
                project,
                **{"save": folders[name] / "run", "command": case.command}
                | case.changes(project, folders[name]),
            )
        ]
        for name, case in EARLY.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
        timeout=100,
    )
    found = json.loads(done.stdout)
    return {name: (folders[name], ended) for name, ended in zip(EARLY, found, strict=True)}


@pytest.mark.parametrize("name", EARLY)
def test_what_is_cheap_to_see_is_refused_before_torch(
    early: dict[str, tuple[Path, list[Any]]], project: Project, name: str
) -> None:
    case, (folder, (code, out, err, heavy)) = EARLY[name], early[name]
    assert code == case.code
    assert case.error in err
    assert case.hint.format(folder=project.folder) in err.split("hint: ")[1]
    assert err.startswith("error: ")
    assert not out
    assert not heavy
    assert not (folder / "run").exists()


def truncated(first: Path, folder: Path) -> Path:
    """A checkpoint whose weights end too early."""
    damaged = folder / "iter_0000003"
    shutil.copytree(first / "iter_0000003", damaged)
    for file in damaged.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return damaged


def without(name: str) -> Callable[[Path, Path], Path]:
    def damage(first: Path, folder: Path) -> Path:
        damaged = folder / "iter_0000003"
        shutil.copytree(first / "iter_0000003", damaged)
        (damaged / name).unlink()
        return damaged

    return damage


def garbled(name: str) -> Callable[[Path, Path], Path]:
    def damage(first: Path, folder: Path) -> Path:
        damaged = folder / "iter_0000003"
        shutil.copytree(first / "iter_0000003", damaged)
        (damaged / name).write_bytes(b"\x80garbage")
        return damaged

    return damage


DAMAGES = {
    "truncated": truncated,
    "no metadata.json": without("metadata.json"),
    "no .metadata": without(".metadata"),
    "no common.pt": without("common.pt"),
    "garbled .metadata": garbled(".metadata"),
    "garbled common.pt": garbled("common.pt"),
    "garbled metadata.json": garbled("metadata.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(
    first: tuple[Path, Ended], project: Project, tmp_path: Path, damage: str
) -> None:
    damaged = DAMAGES[damage](first[0], tmp_path)
    ended = call(*options(project, tmp_path / "run", resume=damaged))
    assert ended.code == 3, ended.err
    assert str(damaged) in ended.err.split("error: ")[1]
    assert "older checkpoint" in ended.err.split("hint: ")[1]
    assert "Traceback" not in ended.err
    assert not checkpoints(tmp_path / "run")


def test_weights_alone_are_refused(project: Project, tmp_path: Path) -> None:
    succeed("convert", "hf2mg", project.model, tmp_path / "iter_0000001", "--format", "dist")
    ended = call(*options(project, tmp_path / "run", resume=tmp_path / "iter_0000001"))
    assert ended.code == 3, ended.err
    assert f"{tmp_path / 'iter_0000001'} holds weights without training state" in ended.err
    assert "hint: start a new run from it with --model" in ended.err
    assert not checkpoints(tmp_path / "run")


@pytest.mark.parametrize("name", ["none", "model"])
def test_a_folder_without_checkpoints_is_refused(
    project: Project, tmp_path: Path, name: str
) -> None:
    ended = call(*options(project, tmp_path / "run", resume=project.folder / name))
    assert ended.code == 3, ended.err
    assert f"--resume {project.folder / name} is no checkpoint" in ended.err
    assert "RUN/iter_0000030" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_kind_of_optimizer_is_refused(run: Path, project: Project) -> None:
    ended = call(*options(project, run, train_iters=8), "--no-distributed-optimizer")
    assert ended.code == 3, ended.err
    assert "was saved with a distributed optimizer" in ended.err
    assert "hint: resume with --distributed-optimizer" in ended.err
    assert checkpoints(run) == ["iter_0000003", "iter_0000006"]


def test_a_checkpoint_of_another_shape_is_refused(run: Path, project: Project) -> None:
    config = file_in(run.parent)
    values = json.loads((project.model / "config.json").read_text())
    config.write_text(json.dumps(values | {"ffn_hidden_size": 64}))
    changes = {"model": None, "from_scratch": True, "model_config": config}
    ended = call(*options(project, run, train_iters=8, tokenizer=project.tokenizer, **changes))
    assert ended.code == 3, ended.err
    assert str(run / "iter_0000006") in ended.err
    assert checkpoints(run) == ["iter_0000003", "iter_0000006"]


def test_a_token_beyond_the_vocabulary_is_named(project: Project, tmp_path: Path) -> None:
    data = write_bad_task(tmp_path / "bad")
    changes = {"data": data, "split": "1,0,0", "micro_batch_size": 1}
    ended = call(*options(project, tmp_path / "run", "finetune", **changes))
    assert ended.code == 3, ended.err
    assert "sample 1 has token id 5000, but the model's vocabulary has 1024 entries" in ended.err
    assert "hint: preprocess the data with this model's tokenizer" in ended.err
    assert not checkpoints(tmp_path / "run")


def test_a_split_without_documents_is_refused(project: Project, tmp_path: Path) -> None:
    ended = call(*options(project, tmp_path / "run", split="0,1,0"))
    assert ended.code == 3, ended.err
    assert "--split 0,1,0 of 50 document(s) leaves none for training" in ended.err
    assert not checkpoints(tmp_path / "run")
