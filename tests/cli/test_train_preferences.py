"""Runs of finetune on pairs and on feedback, as a user types them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.kills import kill_at_random
from tests.support.preferences import write_rows
from tests.support.project import Project, call, records, steps
from tests.support.report_page import read_page
from tests.support.train_command import flag, losses, options, succeed

SHORT = {"train_iters": 2, "save_interval": None, "seq_length": 64}


@pytest.fixture(scope="session")
def rows(project: Project) -> tuple[Path, Path]:
    """Raw files of pairs and of feedback."""
    return write_rows(project.folder / "task.jsonl", project.folder)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what is made of these before a training."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(project: Project, rows: tuple[Path, Path], cache: Path, tmp_path: Path) -> Any:
    """Runs finetune by a method, and returns the folder of the run and its log."""

    def run(name: str, method: str, **changes: Any) -> tuple[Path, str]:
        data = rows[1] if method == "kto" else rows[0]
        values = SHORT | {"data": data, "data_cache": cache, "method": method} | changes
        return tmp_path / name, succeed(
            *options(project, tmp_path / name, "finetune", **values)
        ).err

    return run


def preprocess(project: Project, file: Path, prefix: Path, **changes: Any) -> None:
    """Preprocesses pairs by the command."""
    values = {"input": file, "tokenizer": project.tokenizer, "output_prefix": prefix}
    values |= {"handler": "preference", "workers": 1, **changes}
    words = [flag(f"--{name.replace('_', '-')}", value) for name, value in values.items()]
    succeed("preprocess", *(word for pair in words for word in pair))


def test_dpo_starts_at_its_reference_and_leaves_it(run: Any) -> None:
    folder, log = run("run", "dpo", train_iters=6, split="80,20,0", eval_interval=3, eval_iters=1)
    first, *_, last = steps(folder)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/chosen"] == first["rewards/margins"] == 0
    assert last["rewards/margins"] > 0.05
    assert last["rewards/accuracies"] > 0.5
    for step in steps(folder):
        margin = step["rewards/chosen"] - step["rewards/rejected"]
        assert step["rewards/margins"] == pytest.approx(margin, abs=1e-6)
    validations = [record for record in records(folder) if "validation_loss" in record]
    assert [record["iteration"] for record in validations] == [3, 6]
    assert validations[1]["validation_rewards/margins"] > 0
    assert "| rewards/accuracies 1.0" in log
    assert "ppl" not in log
    page = read_page(folder / "report.html")
    assert {curve["name"] for curve in page.charts["Rewards"]} >= {
        "chosen",
        "margins",
        "accuracies",
    }


def test_what_a_reference_has_seen_it_does_not_look_at_again(
    run: Any, cache: Path, tmp_path: Path
) -> None:
    whole = losses(run("whole", "dpo", data_cache=tmp_path / "cache")[0])
    _, log = run("again", "dpo", data_cache=tmp_path / "cache")
    assert "the reference looks at" not in log
    assert losses(tmp_path / "again") == whole
    [file] = (tmp_path / "cache").glob("*.reference.npz")
    table = dict(np.load(file))
    assert not np.isnan(table["own"]).all()
    table["own"][:40] = np.nan  # as if it had been killed before
    np.savez(file, **table)
    _, log = run("rest", "dpo", data_cache=tmp_path / "cache")
    assert "the reference looks at" in log
    assert losses(tmp_path / "rest") == pytest.approx(whole, rel=1e-6)
    file.write_bytes(file.read_bytes()[:100])  # a damaged file says nothing
    _, log = run("damaged", "dpo", data_cache=tmp_path / "cache")
    assert losses(tmp_path / "damaged") == whole


def test_another_model_can_be_the_reference(run: Any, tmp_path: Path) -> None:
    tuned, _ = run("tuned", "simpo", train_iters=4, beta=2.0)
    model = tuned / "iter_0000004"
    ours = steps(run("ours", "dpo")[0])[0]
    theirs = steps(run("theirs", "dpo", model=model)[0])[0]
    found = steps(run("found", "dpo", reference=model)[0])[0]
    for name in ("chosen", "rejected"):
        assert found[f"logps/{name}"] == ours[f"logps/{name}"]
        difference = ours[f"logps/{name}"] - theirs[f"logps/{name}"]
        assert abs(difference) > 0.1
        assert found[f"rewards/{name}"] == pytest.approx(0.1 * difference, rel=1e-4)


def test_the_reference_of_an_adapter_is_the_model_without_it(run: Any, tmp_path: Path) -> None:
    first, *_, last = steps(run("lora", "dpo", train_iters=6, lora_rank=4, lr=1e-2)[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["rewards/margins"] > 0.05
    plain = steps(run("plain", "dpo")[0])[0]
    assert first["logps/chosen"] == pytest.approx(plain["logps/chosen"], rel=1e-6)
    folder, log = run("further", "dpo", adapter=tmp_path / "lora/iter_0000006/adapter")
    assert "the reference looks at" not in log
    assert steps(folder)[0]["rewards/margins"] > 0.05


def test_kto_compares_with_mismatched_answers(run: Any) -> None:
    folder, _ = run("run", "kto", train_iters=6, desirable_weight=1.5)
    first, *_, last = steps(folder)
    liked = 1.5 * 0.5
    assert 0.5 <= first["loss"] <= liked
    assert first["rewards/chosen"] == first["kl/estimate"] == 0
    assert last["rewards/chosen"] != 0
    assert all(step["kl/estimate"] >= 0 for step in steps(folder))
    assert any("rewards/margins" in step for step in steps(folder))


@pytest.mark.parametrize("method", ["orpo", "simpo", "kto"])
def test_packed_samples_train_as_single_ones(run: Any, method: str) -> None:
    """All of the data is one step, so that both see the same answers."""
    changes = {"micro_batch_size": 1, "train_iters": 1, "split": "1,0,0"}
    single, _ = run("single", method, global_batch_size=50, **changes)
    packed, _ = run("packed", method, global_batch_size=1, packing=True, seq_length=2048, **changes)
    [one], [other] = steps(single), steps(packed)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    if method != "kto":  # which mismatched answers fit differs
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_run_goes_on_without_its_cache(run: Any, tmp_path: Path) -> None:
    whole = losses(run("whole", "dpo", train_iters=4)[0])
    changes = {"save_interval": 2, "lr_decay_style": "constant", "data_cache": tmp_path / "other"}
    run("parts", "dpo", train_iters=2, **changes)
    shutil.rmtree(tmp_path / "other")
    _, log = run("parts", "dpo", train_iters=4, **changes)
    assert "the reference looks at" in log
    assert losses(tmp_path / "parts") == whole


def test_files_that_preprocess_has_packed_train_as_single_ones(
    run: Any, project: Project, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    """All of the data is one step, so that both see the same answers."""
    preprocess(project, rows[0], tmp_path / "out", seq_length=2048, pack=True)
    changes = {"method": "orpo", "micro_batch_size": 1, "train_iters": 1, "split": "1,0,0"}
    single, _ = run("single", global_batch_size=50, **changes)
    changes |= {"data": tmp_path / "out", "seq_length": 2048}
    packed, _ = run("packed", global_batch_size=1, **changes)
    [one], [other] = steps(single), steps(packed)
    for name in ("loss", "rewards/margins", "odds/log_odds_ratio", "loss_terms/nll"):
        assert one[name] == pytest.approx(other[name], rel=1e-5), name
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_reference_of_another_shape(
    project: Project, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(project.model, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["num_layers"] += 1
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    changes = SHORT | {"data": rows[0], "method": "dpo", "reference": tmp_path / "other"}
    ended = call(*options(project, tmp_path / "run", "finetune", **changes))
    assert ended.code == 2
    assert "has another shape than the model: num_layers 3 instead of 2" in ended.err


def test_pairs_that_were_made_for_longer_sequences(
    project: Project, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    preprocess(project, rows[0], tmp_path / "out")
    changes = SHORT | {"data": tmp_path / "out", "method": "simpo", "seq_length": 16}
    ended = call(*options(project, tmp_path / "run", "finetune", **changes))
    assert ended.code == 3
    assert "samples are longer than the 32 tokens that two sequences of --seq-length" in ended.err


@pytest.mark.slow
def test_kill_9_at_random_moments(
    project: Project, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    changes = {"data": rows[0], "method": "dpo", "seq_length": 64, "keep_last": 2}
    changes |= {"save_interval": 3, "train_iters": 30}
    succeed(*options(project, tmp_path / "whole", "finetune", **changes))
    command = options(project, tmp_path / "killed", "finetune", **changes)
    kills = kill_at_random(command, tmp_path / "killed/metrics.jsonl", kills=3, longest=0.8, seed=2)
    assert kills == 3
    assert losses(tmp_path / "killed")[-1] == losses(tmp_path / "whole")[-1]


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        (
            {"method": "sft", "beta": 0.2},
            2,
            "--beta 0.2 is for --method dpo or kto or orpo or simp",
        ),
        ({"method": "orpo", "reference": "x"}, 2, "--reference x is for --method dpo or kto, not"),
        ({"method": "dpo", "simpo_gamma": 1.0}, 2, "--simpo-gamma 1.0 is for --method simpo"),
        ({"preference_loss": "robust"}, 2, "robust needs a --label-smoothing"),
        ({"preference_loss": "ipo", "label_smoothing": 0.1}, 2, "is for --preference-loss sigmoid"),
        ({"reference": "nowhere"}, 3, "nowhere"),
        ({"data": "task"}, 3, "these are there: finetune --data"),
        ({"data": "feedback.jsonl"}, 3, "chosen"),
        ({"method": "kto"}, 3, "label"),
    ],
)
def test_what_does_not_go_together(
    project: Project,
    rows: tuple[Path, Path],
    tmp_path: Path,
    changes: Any,
    code: int,
    sentence: str,
) -> None:
    values = SHORT | {"data": rows[0], "method": "dpo"} | changes
    if isinstance(values["data"], str):
        values["data"] = project.folder / values["data"]
    ended = call(*options(project, tmp_path / "run", "finetune", **values))
    assert ended.code == code, ended.err
    assert sentence in ended.err
    assert not (tmp_path / "run/metrics.jsonl").exists()
