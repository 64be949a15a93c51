"""`glm3 finetune` on samples of different lengths: packs, groups, and what is reported of them."""

from pathlib import Path

import pytest

from tests.support.project import Project, call, records, steps
from tests.support.train_command import losses, options, succeed

WIDE = {"seq_length": 64, "train_iters": 4, "save_interval": 2}


def test_raw_data_is_packed_as_preprocessed_data_is(project: Project, tmp_path: Path) -> None:
    for name, data in {"raw": project.folder / "task.jsonl", "made": project.task}.items():
        succeed(*options(project, tmp_path / name, "finetune", data=data, packing=True, **WIDE))
    assert losses(tmp_path / "raw") == losses(tmp_path / "made")
    for step in steps(tmp_path / "raw"):
        # Four packs that are nearly full.
        assert 0.8 < step["unpadded_tokens_per_second"] / step["tokens_per_second"] <= 1


def test_lengths_are_reported_padded_and_unpadded(project: Project, tmp_path: Path) -> None:
    full, longest = tmp_path / "full", tmp_path / "longest"
    succeed(*options(project, full, "finetune", padding="full", **WIDE))
    ended = succeed(*options(project, longest, "finetune", pad_to_multiple=1, **WIDE))
    assert losses(longest) == pytest.approx(losses(full), rel=1e-5)
    for first, second in zip(steps(full), steps(longest), strict=True):
        assert first["consumed_tokens"] == first["iteration"] * 4 * 64
        assert second["consumed_tokens"] < first["consumed_tokens"] / 2
        ways = ("tokens_per_second", "unpadded_tokens_per_second", "trained_tokens_per_second")
        padded, unpadded, trained = (second[way] for way in ways)
        assert padded >= unpadded > trained > 0
        # Attention goes by the square of the padded lengths: short samples have fewer operations.
        per_token = [
            step["tflops_per_device"] / step["tokens_per_second"] for step in (first, second)
        ]
        assert per_token[1] < per_token[0]
    assert " | tokens/s unpadded " in ended.err


def test_a_grouped_run_that_goes_on_equals_one_that_did_not_stop(
    project: Project, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    changes = {**WIDE, "group_by_length": True}
    succeed(*options(project, whole, "finetune", **changes))
    succeed(*options(project, resumed, "finetune", **{**changes, "train_iters": 2}))
    succeed(*options(project, resumed, "finetune", **changes))
    assert losses(resumed) == losses(whole)
    sizes = [step["consumed_tokens"] for step in steps(whole)]
    assert sizes[0] == max(b - a for a, b in zip([0, *sizes], sizes, strict=False))


def test_options_that_exclude_each_other(project: Project, tmp_path: Path) -> None:
    both = options(project, tmp_path / "run", "finetune", packing=True, group_by_length=True)
    ended = call(*both)
    assert ended.code == 2
    assert "drop it or --group-by-length" in ended.err
    ended = call(*options(project, tmp_path / "run", "pretrain", packing=True))
    assert ended.code == 2
    assert not (tmp_path / "run").exists()


def test_the_start_shows_samples_and_warns(project: Project, tmp_path: Path) -> None:
    ended = succeed(*options(project, tmp_path / "run", "finetune", preview=2, **WIDE))
    assert "sample 2 of " in ended.err
    assert ":<|assistant|>\n" in ended.err
    assert "of the tokens are trained; 0.0% of the samples are cut" in ended.err
    assert "warning: " not in ended.err
    changes = {**WIDE, "seq_length": 256, "preview": 0, "train_iters": 1}
    ended = succeed(*options(project, tmp_path / "long", "finetune", **changes))
    assert "sample 1 of " not in ended.err
    assert "warning: --seq-length 256 is more than the 128 positions" in ended.err


def test_the_loss_of_each_data_set_is_reported(project: Project, tmp_path: Path) -> None:
    run, page = tmp_path / "run", tmp_path / "run" / "report.html"
    blended = ("--data", f"3:{project.folder / 'task.jsonl'}", "--data", f"1:{project.task}")
    changes = {**WIDE, "data": None, "eval_interval": 2, "eval_iters": 1, "split": "80,20,0"}
    ended = succeed(*options(project, run, "finetune", **changes), *blended)
    for step in steps(run):
        first, second = (step[name] for name in step if name.startswith("loss by data/"))
        assert min(first, second) <= step["loss"] <= max(first, second)
        consumed = step["consumed_by_source"]
        assert sum(part["samples"] for part in consumed.values()) == step["consumed_samples"]
        tokens = sum(part["tokens"] for part in consumed.values())
        assert 0 < tokens < step["consumed_tokens"]
    assert " | loss by data/task 1" not in ended.err
    assert ended.err.count(" | loss by data/task ") >= 4
    validated = [record for record in records(run) if "validation_loss" in record]
    assert all("validation_loss by data/task" in record for record in validated)
    assert "Loss by data" in page.read_text("utf-8")
