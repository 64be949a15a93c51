"""What a run that goes on takes over from the one before, what may differ, and what may not."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.project import Ended, Project, call, events, steps
from tests.support.train_command import LR, checkpoints, losses, options, succeed

MIN_LR = 1e-4


def expected_lr(style: str, step: int, num_steps: int, warmup: float) -> float:
    """The learning rate of a step, counted from 0, by Megatron-LM's formulas in steps."""
    if warmup and step <= warmup:
        return LR * step / warmup
    if style == "constant":
        return LR
    if style == "inverse-square-root":
        return max(MIN_LR, LR * math.sqrt(max(warmup, 1) / max(step, 1)))
    done = (step - warmup) / (num_steps - warmup)
    share = 1 - done if style == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return MIN_LR + share * (LR - MIN_LR)


@pytest.mark.parametrize(
    ("style", "rise", "warmup"),
    [
        ("constant", {"lr_warmup_iters": 2}, 2),
        ("linear", {}, 0),
        ("linear", {"lr_warmup_fraction": 0.3}, 1.8),
        ("cosine", {"lr_warmup_fraction": 0.5}, 3),
        ("inverse-square-root", {}, 0),
        ("inverse-square-root", {"lr_warmup_iters": 2}, 2),
    ],
)
def test_the_learning_rate_of_every_step_also_with_another_batch_size_later(
    project: Project, tmp_path: Path, style: str, rise: dict[str, Any], warmup: float
) -> None:
    changes = {"lr_decay_style": style, "min_lr": MIN_LR, **rise}
    succeed(*options(project, tmp_path / "run", **changes))
    expected = [expected_lr(style, step, 6, warmup) for step in range(6)]
    assert [step["lr"] for step in steps(tmp_path / "run")] == pytest.approx(expected, rel=1e-12)
    again = tmp_path / "again"
    changes |= {"global_batch_size": 2, "resume": tmp_path / "run/iter_0000003"}
    succeed(*options(project, again, **changes))
    assert [step["lr"] for step in steps(again)] == pytest.approx(expected[3:], rel=1e-12)
    assert [step["consumed_samples"] for step in steps(again)] == [14, 16, 18]
    [resumed] = events(again, "resume")
    assert resumed["changed"] == "global_batch_size 4 -> 2"


def test_a_rollback_stays_on_the_course_of_the_run(run: Path, project: Project) -> None:
    """Step 6 is there, of the course that was left at step 3."""
    changes = {"resume": run / "iter_0000003", "lr": 1e30, "rollback_on_nan": True}
    succeed(*options(project, run, **changes, save_interval=None))
    back = [event["path"] for event in events(run, "rollback")]
    assert back == [str(run / "iter_0000003")] * 2
    assert steps(run)[-1]["nan"] == 2
    assert checkpoints(run) == ["iter_0000003", "iter_0000006"]


def refused(*arguments: Any) -> Ended:
    ended = call(*arguments)
    assert ended.code == 2, ended.err
    assert "is of another training: " in ended.err
    return ended


def test_another_command_is_refused_and_leaves_all_as_it_was(run: Path, project: Project) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    # Whether or not there is something left to do, and before raw data is preprocessed.
    for train_iters in (6, 7):
        raw = project.folder / "task.jsonl"
        changes = {"train_iters": train_iters, "data": raw, "seq_length": 128}
        ended = refused(*options(project, run, "finetune", **changes))
        assert f"{run / 'iter_0000006'} is of another training: command pretrain -> " in ended.err
        assert f"--model {run / 'iter_0000006'} for its weights" in ended.err
        assert "--allow-changed command,data" in ended.err
        ended = refused(*options(project, run, "finetune", **changes, allow_changed="command"))
        assert "is of another training: data " in ended.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_is_allowed_to_change_goes_on(run: Path, project: Project) -> None:
    changes = {"train_iters": 7, "seq_length": 128, "allow_changed": "command,data"}
    succeed(*options(project, run, "finetune", **changes))
    [resumed] = events(run, "resume")
    assert resumed["iteration"] == 6
    assert "command pretrain -> finetune; data " in resumed["changed"]
    assert checkpoints(run)[-1] == "iter_0000007"
    # From now on it is a finetune of these data.
    succeed(*options(project, run, "finetune", train_iters=8, seq_length=128))
    assert "command" in refused(*options(project, run, train_iters=9)).err


def test_other_data_are_refused_and_the_same_elsewhere_are_not(
    run: Path, project: Project, tmp_path: Path
) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{project.text}{suffix}", tmp_path / f"copy{suffix}")
    succeed(*options(project, run, train_iters=7, data=tmp_path / "copy"))
    tokens = bytearray((tmp_path / "copy.bin").read_bytes())
    tokens[len(tokens) // 2] ^= 1
    (tmp_path / "copy.bin").write_bytes(tokens)
    ended = refused(*options(project, run, train_iters=8, data=tmp_path / "copy"))
    assert f": data {tmp_path / 'copy'}: " in ended.err
    assert "--allow-changed data" in ended.err


def test_a_raw_file_that_changed_is_refused_but_another_length_is_not(
    project: Project, tmp_path: Path
) -> None:
    raw, run = tmp_path / "rows.jsonl", tmp_path / "run"
    shutil.copy(project.folder / "task.jsonl", raw)
    changes = {"data": raw, "save_interval": None}
    succeed(*options(project, run, "finetune", **changes, train_iters=1, seq_length=64))
    succeed(*options(project, run, "finetune", **changes, train_iters=2, seq_length=32))
    [resumed] = events(run, "resume")
    assert resumed["changed"] == "seq_length 64 -> 32; train_iters 1 -> 2"
    raw.write_text(raw.read_text("utf-8").replace("a", "e"), "utf-8")
    ended = refused(*options(project, run, "finetune", **changes, train_iters=3, seq_length=32))
    assert f": data {raw}: " in ended.err


def test_another_share_in_a_blend_is_other_data(project: Project, tmp_path: Path) -> None:
    def blend(first: int, second: int) -> list[Any]:
        data = ["--data", f"{first}:{project.text}", "--data", f"{second}:{project.text}"]
        return [*options(project, tmp_path / "run", data=None, train_iters=1), *data]

    succeed(*blend(3, 1))
    succeed(*blend(6, 2))
    assert "0.75 of the samples" in refused(*blend(1, 1)).err


def test_another_model_is_refused_and_the_same_elsewhere_is_not(
    run: Path, project: Project, tmp_path: Path
) -> None:
    shutil.copytree(project.model, tmp_path / "copy")
    succeed(*options(project, run, train_iters=7, model=tmp_path / "copy"))
    # The run itself may be named as its model, whatever it has become.
    succeed(*options(project, run, train_iters=8, model=run))
    succeed("convert", "mg2hf", run, tmp_path / "tuned")
    shutil.rmtree(run / "iter_0000008")  # which says that the run was its own model
    ended = refused(*options(project, run, train_iters=9, model=tmp_path / "tuned"))
    assert f": model {tmp_path / 'copy'}: " in ended.err
    changes = {"model": tmp_path / "tuned", "allow_changed": "model"}
    succeed(*options(project, run, train_iters=9, **changes))


def test_other_settings_are_named(run: Path, project: Project) -> None:
    changes = {"train_iters": 7, "seed": 9, "split": "9,1,0", "lr": 5e-4, "micro_batch_size": 1}
    ended = succeed(*options(project, run, **changes))
    [resumed] = events(run, "resume")
    found = set(resumed["changed"].split("; "))
    assert found == {
        "train_iters 6 -> 7",
        "seed 1234 -> 9",
        "split 949,50,1 -> 9,1,0",
        "lr 0.001 -> 0.0005",
    }
    assert "the order of the samples (other " in resumed["not_restored"]
    assert "warning: the run goes on with other settings: " in ended.err
    named = {"train_iters": 8, "seed": 9, "split": "9,1,0", "lr": 5e-4}
    ended = succeed(*options(project, run, **named, allow_changed="train-iters"))
    assert "warning" not in ended.err
    assert events(run, "resume")[-1]["changed"] == "train_iters 7 -> 8"


def test_an_unknown_name_is_not_allowed_to_change(project: Project, tmp_path: Path) -> None:
    ended = call(*options(project, tmp_path / "run", allow_changed="modle"))
    assert ended.code == 2
    assert "--allow-changed modle: unknown key 'modle', did you mean 'model'?" in ended.err


def test_checkpoints_that_say_nothing_go_on_as_they_are(run: Path, project: Project) -> None:
    for manifest in run.glob("*/glm3-manifest.json"):
        values = json.loads(manifest.read_text("utf-8"))
        manifest.write_text(json.dumps(values | {"settings": {}}), "utf-8")
    succeed(*options(project, run, train_iters=7, seed=9))
    assert (
        events(run, "resume")[0]["changed"] == "unknown: the checkpoint doesn't say what it is of"
    )


def test_nothing_left_to_do_is_said(run: Path, project: Project, tmp_path: Path) -> None:
    before = losses(run)
    for train_iters in (6, 5):
        ended = succeed(*options(project, run, train_iters=train_iters))
        assert ended.out == f"{run / 'iter_0000006'}\n"
        assert "warning: NOTHING IS TRAINED" in ended.err
        assert "is at iteration 6, and --train-iters is" in ended.err
    assert losses(run) == before
    assert [event["train_iters"] for event in events(run, "nothing_to_do")] == [6, 5]
    # The checkpoint that is printed exists, also where the run has none of its own.
    ended = succeed(*options(project, tmp_path / "new", resume=run / "iter_0000006"))
    assert ended.out == f"{run / 'iter_0000006'}\n"
    assert checkpoints(tmp_path / "new") == []
