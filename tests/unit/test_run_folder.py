"""What a run writes into its folder: its progress, its metrics, and its settings."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from glm3cli.checkpoint.run.resume import schedule_position
from glm3cli.config.presets import PRESETS
from glm3cli.data.samples.loader import StepSize
from glm3cli.train.progress.flops import Utilisation, flops_per_token
from glm3cli.train.progress.phases import Phase
from glm3cli.train.progress.state import State, StepOutcome
from glm3cli.train.report.history import History
from glm3cli.train.report.metrics import Metrics
from glm3cli.train.run import write_run_file
from tests.support.config_file import read
from tests.support.tiny import train_config

STEP_FIELDS = [
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
]
# Four sequences of 48 tokens and four of 16, of which some are padding.
SIZE = StepSize(tokens=256, unpadded=200, squares=4 * 48**2 + 4 * 16**2)
LENGTH = (48**2 + 16**2) / (48 + 16)
TFLOPS, CAUSAL = (
    128 * flops_per_token(PRESETS["6b"], LENGTH, convention) / 1e12
    for convention in ("full", "causal")
)
SPENT: dict[Phase, float] = {
    "data_wait": 0.1,
    "forward_backward": 0.25,
    "optimizer": 0.1,
    "other": 0.05,
}


def outcome(**changes: Any) -> StepOutcome:
    values: dict[str, Any] = {
        "loss": 2.0,
        "num_tokens": 7,
        "grad_norm": 1.5,
        "loss_scale": 4096.0,
        "lr": 1e-5,
        "skipped": False,
        **changes,
    }
    return StepOutcome(**values)


# --- progress ---


def test_a_step_advances_samples_tokens_and_faults():
    state = State()
    state.advance(outcome(), 8, 256)
    state.advance(outcome(skipped=True, loss=math.nan), 8, 256)
    state.advance(outcome(loss=math.inf), 8, 200)
    assert state == State(3, 24, 712, skipped=1, nan=2)


def test_progress_survives_a_checkpoint():
    state = State(3, 24, 768, skipped=1, nan=2)
    assert State.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_a_batch_with_a_sample_that_is_left_out_is_stepped_over_whatever_its_size():
    state = State(2, 16, 512, stepped_over=[(16, 24)])
    assert [state.leaves_out(size) for size in (4, 8)] == [True, True]
    state.step_over(4, 32)
    assert state.leaves_out(4)
    state.step_over(4, 32)
    assert not state.leaves_out(64)
    assert State(consumed_samples=12, stepped_over=[(16, 24)]).leaves_out(5)
    assert not State(consumed_samples=12, stepped_over=[(16, 24)]).leaves_out(4)


def test_progress_of_older_checkpoints_has_first_samples_alone():
    values = {"iteration": 2, "consumed_samples": 16, "stepped_over": [16]}
    assert State.from_dict(values).leaves_out(8)


@pytest.mark.parametrize(
    "common",
    [
        {"schedule_updates": 5},
        {"schedule_steps": 40, "progress": {"iteration": 6, "consumed_samples": 48}},
    ],
    ids=["now", "counted in samples, by older versions"],
)
def test_the_schedule_goes_on_after_the_steps_that_were_not_skipped(common: dict[str, Any]):
    assert schedule_position(common) == 5


# --- metrics ---


@pytest.fixture
def record(tmp_path, capsys):
    """Reports to a new run, and returns the lines of metrics.jsonl and of stderr."""

    def record(
        report: Any, *, is_speaker: bool = True, peak: float | None = None, **options: Any
    ) -> tuple[list, list[str]]:
        config = train_config(save=tmp_path / "run", seq_length=32, global_batch_size=8, **options)
        utilisation = Utilisation(PRESETS["6b"], 32, peak_tflops=peak, chip="a chip")
        metrics = Metrics(config, is_speaker=is_speaker, utilisation=utilisation, world_size=4)
        report(metrics)
        metrics.close()
        file = tmp_path / "run" / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines], capsys.readouterr().err.splitlines()

    return record


def one_step(metrics: Metrics) -> None:
    metrics.step(State(2, 16, 512, skipped=1), outcome(loss=1 / 3), SIZE, 3 * 2**20, SPENT)


def test_a_step_is_one_object_with_all_fields(record):
    (line,), _ = record(one_step)
    assert list(line) == STEP_FIELDS
    assert line == {
        "iteration": 2,
        "consumed_samples": 16,
        "consumed_tokens": 512,
        "loss": 1 / 3,  # with full precision
        "lr": 1e-5,
        "grad_norm": 1.5,
        "loss_scale": 4096.0,
        "step_time": pytest.approx(0.5),
        "tokens_per_second": pytest.approx(512.0),
        "tokens_per_second_per_device": pytest.approx(128.0),
        "unpadded_tokens_per_second": pytest.approx(400.0),
        "trained_tokens_per_second": pytest.approx(14.0),
        "tflops_per_device": pytest.approx(TFLOPS),
        "tflops_per_device_causal": pytest.approx(CAUSAL),
        "mfu": None,
        "mfu_causal": None,
        "skipped": 1,
        "nan": 0,
        "peak_memory_bytes": 3 * 2**20,
        "data_wait_time": 0.1,
        "forward_backward_time": 0.25,
        "optimizer_time": 0.1,
        "other_time": 0.05,
    }


def test_a_step_is_one_line_in_the_log(record):
    _, (line,) = record(one_step)
    fields = re.sub(r" +", " ", line).split("] ", 1)[1].split(" | ")
    assert fields == [
        "iteration 2/ 20",
        "consumed samples 16",
        "consumed tokens 512",
        "loss 3.333333E-01",
        "lr 1.000000E-05",
        "grad norm 1.500",
        "loss scale 4096.0",
        "step time (ms) 500.0",
        "tokens/s/device 128.0",
        "tokens/s unpadded 400.0",
        "tokens/s trained 14.0",
        f"TFLOP/s/device {TFLOPS:.3f}",
        "MFU -",
        "skipped 1",
        "nan 0",
        "peak memory (MB) 3",
    ]


def test_mfu_is_reported_by_both_conventions_where_the_peak_is_known(record):
    (step,), (line,) = record(one_step, peak=TFLOPS / 0.64)
    assert step["mfu"] == pytest.approx(0.64)
    assert step["mfu_causal"] == pytest.approx(0.64 * CAUSAL / TFLOPS)
    assert f" | MFU 64.0% full, {step['mfu_causal']:.1%} causal | " in line


def test_the_end_reports_where_the_time_went(record):
    totals: dict[Phase, float] = {**SPENT, "save": 0.5}
    (stop,), log = record(lambda metrics: metrics.stop(State(7), totals))
    assert (stop["event"], stop["iteration"], stop["seconds"]) == ("stop", 7, totals)
    assert "time: data wait 0.1 s (10.0%) | forward backward 0.2 s (25.0%)" in log[0]
    assert log[1].endswith("] stop: iteration 7, consumed_by_source none")


def test_tables_of_an_event_are_not_in_the_log(record):
    (start,), (line,) = record(lambda metrics: metrics.event("start", unsaid={"sources": []}, tp=2))
    assert start["sources"] == []
    assert line.endswith("] start: tp 2")


def test_a_line_that_a_killed_run_left_unfinished_is_removed(record, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n{"itera')
    lines, _ = record(lambda metrics: metrics.validation(2, 1.5, {}))
    assert lines == [
        {"iteration": 1, "loss": 2.0},
        {"iteration": 2, "validation_loss": 1.5},
    ]


def test_the_log_may_be_sparser_than_the_file(record):
    def steps(metrics: Metrics) -> None:
        for iteration in range(1, 8):
            metrics.step(State(iteration), outcome(), SIZE, 0, SPENT)

    lines, log = record(steps, log_interval=3)
    assert [line["iteration"] for line in lines] == list(range(1, 8))
    assert [re.search(r"iteration +(\d+)", line)[1] for line in log] == ["3", "6"]


def test_a_validation_and_an_event_are_lines_of_their_own(record):
    def report(metrics: Metrics) -> None:
        metrics.event("start", command="pretrain", tp=2)
        metrics.validation(10, 2.0, {})
        metrics.event("stop")

    (start, validation, stop), log = record(report)
    assert {key: value for key, value in start.items() if key != "time"} == {
        "event": "start",
        "command": "pretrain",
        "tp": 2,
    }
    assert validation == {"iteration": 10, "validation_loss": 2.0}
    assert stop["event"] == "stop"
    assert log[0].endswith("] start: command pretrain, tp 2")
    assert log[1].endswith("validation at iteration 10 | loss 2.000000E+00 | ppl 7.389056E+00")
    assert log[2].endswith("] stop")


def test_a_validation_without_anything_to_train_has_no_perplexity(record):
    _, log = record(lambda metrics: metrics.validation(10, math.nan, {}))
    assert log[0].endswith("| loss NAN | ppl NAN")


def test_further_means_are_in_the_lines_of_steps_and_validations(record):
    def report(metrics: Metrics) -> None:
        means = {"rewards/chosen": 0.5, "rewards/rejected": -0.25}
        metrics.step(State(1), outcome(means=means), SIZE, 2**20, SPENT)
        metrics.validation(1, 2.0, means)

    (step, validation), log = record(report)
    assert [step["rewards/chosen"], step["rewards/rejected"]] == [0.5, -0.25]
    assert validation["validation_rewards/chosen"] == 0.5
    for line in log:
        assert line.endswith(" | rewards/chosen 5.000000E-01 | rewards/rejected -2.500000E-01")


def test_a_run_that_goes_on_adds_to_its_file(record):
    record(one_step)
    lines, _ = record(one_step)
    assert len(lines) == 2


def test_the_page_is_written_at_a_save_and_at_the_end(record, tmp_path):
    page, found = tmp_path / "run" / "report.html", []

    def report(metrics: Metrics) -> None:
        one_step(metrics)
        found.append(page.exists())
        metrics.event("save", iteration=2)
        found.append(page.exists())
        page.unlink()

    record(report)
    assert found == [False, True]
    assert page.exists()


def test_a_page_that_cannot_be_written_does_not_end_the_run(record, monkeypatch):
    def full(_run: Path, _history: History) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glm3cli.train.report.metrics.write_report", full)
    lines, log = record(one_step)
    assert len(lines) == 1
    assert log[-1].endswith("] report.html is not written: No space left on device")


def test_only_one_rank_writes(record, tmp_path):
    assert record(one_step, is_speaker=False) == ([], [])
    assert not (tmp_path / "run").exists()


# --- run.yaml ---


def test_the_run_file_gives_the_same_run_again(tmp_path):
    config = train_config(save=tmp_path / "run", data=["0.5:数据", "0.5:b"], lr=1e-6, min_lr=1e-8)
    write_run_file(config)
    assert read(type(config), tmp_path / "run" / "run.yaml") == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.yaml"]
