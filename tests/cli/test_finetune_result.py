"""How long `glm3 finetune` trains, and what it leaves: the best checkpoint, and an export."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.project import Project, call, end, events, records, start, steps
from tests.support.train_command import checkpoints, losses, options, succeed

# A learning rate at which the loss of the few samples for validation soon rises.
WORSE = {
    "split": "60,40,0",
    "seq_length": 32,
    "train_iters": 16,
    "eval_interval": 2,
    "eval_iters": 2,
    "lr": 3e-2,
    "save_interval": 5,
}


def validations(run: Path) -> dict[int, float]:
    """The validation losses by iteration."""
    lines = [record for record in records(run) if "validation_loss" in record]
    return {line["iteration"]: line["validation_loss"] for line in lines}


def linked(run: Path) -> str:
    """The checkpoint that RUN/best is."""
    return (run / "best").readlink().name


def best_of(run: Path) -> int:
    found = validations(run)
    return min(found, key=lambda iteration: found[iteration])


@pytest.fixture(scope="module")
def tuned(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps its best checkpoint, and ends without --early-stop."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    succeed(*options(project, run, "finetune", keep_best=True, keep_last=1, **WORSE))
    return run


def test_the_best_checkpoint_is_kept(tuned: Path) -> None:
    best = best_of(tuned)
    assert 2 < best < 16, "the test needs a loss that falls and rises"
    assert linked(tuned) == f"iter_{best:07d}"
    assert checkpoints(tuned) == [f"iter_{best:07d}", "iter_0000016"]


def test_the_best_checkpoint_is_a_model(tuned: Path, project: Project, tmp_path: Path) -> None:
    changes = {**WORSE, "train_iters": 2, "model": tuned / "best", "lr": 1e-9, "eval_interval": 1}
    succeed(*options(project, tmp_path / "run", "finetune", **changes))
    found = validations(tuned)
    assert validations(tmp_path / "run")[1] == pytest.approx(found[best_of(tuned)], rel=1e-4)


def test_a_run_ends_when_validations_get_no_better(
    tuned: Path, project: Project, tmp_path: Path
) -> None:
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    ended = succeed(*options(project, run, "finetune", early_stop=2, **WORSE))
    found = validations(tuned)
    iterations = list(found)
    counts = [
        number - min(range(number + 1), key=lambda n: found[iterations[n]])
        for number in range(len(iterations))
    ]
    iteration = iterations[counts.index(2)]
    assert list(validations(run)) == [i for i in found if i <= iteration]
    assert ended.out == f"{run}/iter_{iteration:07d}\n"
    [event] = events(run, "early_stop")
    assert (event["iteration"], event["validations"]) == (iteration, 2)
    assert event["best_loss"] == min(validations(run).values())
    assert "finished by --early-stop" in (run / "report.html").read_text("utf-8")
    # A run that is stopped and goes on ends at the same step, with the same losses.
    for steps_at_once in (3, 6, 16):
        changes = {**WORSE, "train_iters": steps_at_once, "lr_decay_style": "constant"}
        succeed(*options(project, resumed, "finetune", early_stop=2, **changes))
    assert losses(resumed) == losses(run)
    assert validations(resumed) == validations(run)
    # There is nothing left to do.
    succeed(*options(project, resumed, "finetune", early_stop=2, **WORSE))
    assert losses(resumed) == losses(run)


def test_a_best_step_without_a_checkpoint_is_not_kept(project: Project, tmp_path: Path) -> None:
    run, export = tmp_path / "run", tmp_path / "export"
    changes = {**WORSE, "eval_interval": 1, "eval_iters": 1, "lr": 1.0, "save_interval": None}
    succeed(*options(project, run, "finetune", **changes | {"train_iters": 2}))
    assert best_of(run) == 1
    changes |= {"keep_best": True, "export_hf": export, "train_iters": 3}
    ended = succeed(*options(project, run, "finetune", **changes))
    assert f"warning: the best step so far, 1, has no checkpoint in {run}; --keep" in ended.err
    assert linked(run) == "iter_0000003"
    assert (export / "config.json").exists()


@pytest.mark.slow
def test_the_best_checkpoint_survives_kills(tuned: Path, project: Project, tmp_path: Path) -> None:
    from tests.support.kills import kill_at_random

    run = tmp_path / "run"
    command = options(project, run, "finetune", keep_best=True, keep_last=1, **WORSE)
    assert kill_at_random(command, run / "metrics.jsonl", kills=5, longest=0.4, seed=2) == 5
    assert losses(run)[-1] == losses(tuned)[-1]
    assert linked(run) == linked(tuned)
    assert checkpoints(run) == checkpoints(tuned)


@pytest.mark.slow
def test_a_stop_within_a_validation_leaves_it_to_the_run_that_goes_on(
    project: Project, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    changes = {**WORSE, "eval_iters": 20_000, "train_iters": 4, "save_interval": None}
    process = start(log, *options(project, run, "finetune", keep_best=True, **changes))
    from tests.cli.test_train_durability import has_steps, wait_until

    wait_until(lambda: has_steps(run, 2), process)
    process.send_signal(signal.SIGTERM)
    assert end(process, log).code == 143
    assert not validations(run)
    succeed(*options(project, run, "finetune", keep_best=True, **{**changes, "eval_iters": 2}))
    assert list(validations(run)) == [2, 4]


def test_epochs_are_counted_in_steps(project: Project, tmp_path: Path) -> None:
    # 47 samples for training, of which a step takes 4.
    changes: dict[str, Any] = {"seq_length": 32, "train_iters": None, "epochs": 0.5}
    ended = succeed(*options(project, tmp_path / "run", "finetune", **changes))
    assert len(steps(tmp_path / "run")) == math.ceil(0.5 * 47 / 4)
    assert "0.51" in ended.err  # epochs, in the table of the data
    settings = (tmp_path / "run" / "run.yaml").read_text("utf-8")
    assert "train_iters: 6" in settings
    assert "epochs:" not in settings
    # A run that was stopped goes on to the same end.
    resumed = tmp_path / "resumed"
    part = {**changes, "epochs": None, "train_iters": 3}
    succeed(*options(project, resumed, "finetune", **part))
    succeed(*options(project, resumed, "finetune", **changes))
    assert losses(resumed) == losses(tmp_path / "run")
    wide = {**changes, "seq_length": 64, "packing": True}
    packs = options(project, tmp_path / "packs", "finetune", **wide)
    succeed(*packs)
    assert len(steps(tmp_path / "packs")) < 6
    dry = succeed(*options(project, tmp_path / "dry", "finetune", dry_run=True, **changes))
    assert "run: 6 steps" in dry.out
    raw = {**changes, "data": project.folder / "task.jsonl", "dry_run": True}
    dry = succeed(*options(project, tmp_path / "dry", "finetune", **raw))
    assert "run: 0.5 epochs" in dry.out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_iters": None}, "--train-iters is missing; or give --epochs"),
        ({"epochs": 1.0}, "give --train-iters or --epochs, not both"),
        ({"keep_best": True}, "--keep-best goes by validations: give --eval-interval"),
        ({"early_stop": 3}, "--early-stop goes by validations: give --eval-interval"),
    ],
)
def test_lengths_that_make_no_sense(
    changes: dict[str, Any], said: str, project: Project, tmp_path: Path
) -> None:
    ended = call(*options(project, tmp_path / "run", "finetune", **changes))
    assert ended.code == 2
    assert said in ended.err


@pytest.mark.parametrize(
    "trained",
    [
        pytest.param({}, id="weights"),
        pytest.param({"lora_rank": 4}, id="adapter", marks=pytest.mark.slow),
    ],
)
def test_the_result_is_exported(trained: dict[str, Any], project: Project, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, target = tmp_path / "run", tmp_path / "hf"
    changes = {**WORSE, "keep_best": True, "export_hf": target, **trained}
    command = options(project, run, "finetune", **changes)
    ended = succeed(*command)
    assert ended.out == f"{run}/iter_0000016\n"
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer("a lake", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        chances = model(ids).logits[0, -1].log_softmax(-1)
    [ours] = json.loads(
        succeed(
            *("generate", "--model", run / linked(run), "--prompt", "a lake", "--greedy", "--json"),
            *("--max-new-tokens", 1, "--logprobs", "--device", "cpu", "--dtype", "fp32"),
        ).out
    )["results"]
    assert ours["token_ids"] == [int(chances.argmax())]
    assert ours["logprobs"][0] == pytest.approx(float(chances.max()), abs=1e-4)
    # The same command again has nothing to train, and exports again; another run may not.
    succeed(*command)
    other = options(project, tmp_path / "other", "finetune", **changes)
    ended = call(*other)
    assert ended.code == 2
    assert f"--export-hf {target} is there already" in ended.err
    assert not (tmp_path / "other").exists()
