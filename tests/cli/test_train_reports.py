"""What a run writes beside its log: files of other tools, traces, utilisation, and its page."""

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from glm3cli.train.report.report import write_report
from tests.support.event_logs import records as event_records
from tests.support.project import Ended, Project, call, events, glm3, steps
from tests.support.report_page import parse_page, read_page
from tests.support.train_command import losses, options, succeed

SHORT = {"train_iters": 3, "save_interval": None}


def wandb_records(run: Path) -> list[Any]:
    """Returns what wandb has written offline, in the order of its runs."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    found = []
    for file in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        for data in event_records(file):
            message = messages.Record()
            message.ParseFromString(data)
            found.append(message)
    return found


def wandb_points(run: Path, key: str) -> list[tuple[int, float]]:
    points = []
    for message in wandb_records(run):
        items = {i.nested_key[0]: json.loads(i.value_json) for i in message.history.item}
        if key in items:
            points.append((items["iteration"], items[key]))
    return points


def swanlab_points(run: Path, key: str) -> list[tuple[int, float]]:
    messages = importlib.import_module("swanlab.proto.swanlab.record.v1.record_pb2")
    points = []
    for file in sorted(run.glob("swanlab/run-*/run-*.swanlab")):
        for data in event_records(file):
            message = messages.Record()
            message.ParseFromString(data)
            if message.scalar.key == key:
                points.append((message.scalar.step, message.scalar.value.number))
    return points


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Makes the tools write to this machine alone, and read no login of the user."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_wandb_and_swanlab_offline(project: Project, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    pytest.importorskip("swanlab", reason="swanlab is not installed")
    run = tmp_path / "run"
    both = ("--report-to", "wandb", "--report-to", "swanlab")
    watched = SHORT | {"eval_interval": 3, "eval_iters": 1}
    ended = glm3(tmp_path / "log", *options(project, run, **watched), *both)
    assert ended.code == 0, ended.err
    assert ended.out == f"{run / 'iter_0000003'}\n"  # theirs goes to stderr
    expected = list(enumerate(losses(run), 1))
    assert wandb_points(run, "loss") == expected
    assert swanlab_points(run, "loss") == [(i, pytest.approx(loss)) for i, loss in expected]
    assert [i for i, _ in wandb_points(run, "validation_loss")] == [3]
    assert [i for i, _ in swanlab_points(run, "validation_loss")] == [3]
    [started] = [message.run for message in wandb_records(run) if message.HasField("run")]
    settings = {update.key: json.loads(update.value_json) for update in started.config.update}
    assert (settings["lr"], settings["seq_length"], started.project) == (1e-3, 16, "glm3")
    [file] = run.glob("swanlab/run-*/files/config.yaml")
    assert yaml.safe_load(file.read_text())["seq_length"]["value"] == 16
    assert yaml.safe_load((run / "run.yaml").read_text())["report_to"] == ["wandb", "swanlab"]
    # A run that goes on is the same run there, too.
    names = {path.read_text() for path in run.glob("*/run_id")}
    more = options(project, run, **watched | {"train_iters": 4})
    assert glm3(tmp_path / "log", *more, *both).code == 0
    assert [i for i, _ in wandb_points(run, "loss")] == [1, 2, 3, 4]
    assert {path.read_text() for path in run.glob("*/run_id")} == names
    assert {
        message.run.run_id for message in wandb_records(run) if message.HasField("run")
    } <= names


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["wandb", "swanlab"])
def test_a_tool_without_a_login_is_named(
    tool: str, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(tool, reason=f"{tool} is not installed")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    ended = glm3(tmp_path / "log", *options(project, tmp_path / "run", report_to=tool, **SHORT))
    assert ended.code == 2, ended.err
    assert f"error: --report-to {tool}: " in ended.err
    assert f"{tool} login" in ended.err
    assert "Traceback" not in ended.err


def test_a_tool_that_is_not_installed_is_refused_before_anything_is_written(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    ended = call(*options(project, tmp_path / "run", report_to="wandb", **SHORT))
    assert ended.code == 2, ended.err
    assert "error: --report-to wandb: its package isn't installed" in ended.err
    assert "hint: pip install wandb" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_trace_of_some_steps(project: Project, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed(*options(project, run, profile="2:3", **SHORT | {"train_iters": 4}))
    assert [path.name for path in (run / "profile").iterdir()] == ["rank_0_steps_2_3.json.gz"]
    with gzip.open(run / "profile/rank_0_steps_2_3.json.gz", "rt") as file:
        trace = json.load(file)
    names = [
        event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"
    ]
    # Two steps of two micro-batches: a wait for each.
    assert names.count("data_wait") >= 4
    assert names.count("forward_backward") == 2
    products = {"aten::mm", "mkldnn::_linear_pointwise"}  # as the processor has it
    assert any(event["name"] in products for event in trace["traceEvents"])
    assert len(losses(run)) == 4


def test_bad_steps_to_profile_are_refused(project: Project, tmp_path: Path) -> None:
    for given, said in (("9", "give START:STOP"), ("2:9", "goes beyond --train-iters 3")):
        ended = call(*options(project, tmp_path / "run", profile=given, **SHORT))
        assert ended.code == 2, ended.err
        assert said in ended.err
    assert not (tmp_path / "run").exists()


def test_a_given_peak_makes_an_mfu(project: Project, tmp_path: Path) -> None:
    """And, of the same run, what it has computed with."""
    left_out = ("--without-kernel", "adamw")
    ended = succeed(*options(project, tmp_path / "run", peak_tflops=0.5, **SHORT), *left_out)
    [told] = events(tmp_path / "run", "operators")
    assert told["used"] == {"attention": "_scaled_dot_product_flash_attention_for_cpu"}
    assert told["unused"]["adamw"] == "--without-kernel"
    assert told["unused"]["swiglu"] == "this chip has none"
    assert told["on_host"] == "none"
    assert "] operators: used attention _scaled_dot" in ended.err
    assert ", without_kernels adamw" in ended.err
    assert "full 6N + 12*L*h*s = " in ended.err
    assert "peak 0.5 TFLOP/s" in ended.err
    for step in steps(tmp_path / "run"):
        assert step["mfu"] == pytest.approx(step["tflops_per_device"] / 0.5)
        assert step["mfu_causal"] == pytest.approx(step["tflops_per_device_causal"] / 0.5)
        assert 0 < step["mfu_causal"] < step["mfu"]


def test_every_step_says_where_its_time_went(first: tuple[Path, Ended]) -> None:
    run, ended = first
    parts = ("data_wait", "forward_backward", "optimizer", "other")
    for step in steps(run):
        spent = [step[f"{part}_time"] for part in parts]
        assert sum(spent) == pytest.approx(step["step_time"])
        assert all(seconds > 0 for seconds in spent)
    [stop] = events(run, "stop")
    assert stop["seconds"]["save"] > 0
    in_steps = sum(step["optimizer_time"] for step in steps(run))
    assert stop["seconds"]["optimizer"] == pytest.approx(in_steps)
    assert "] time: data wait " in ended.err
    assert "FLOPs per token: full 6N + 12*L*h*s = " in ended.err


def test_the_page_of_a_run(first: tuple[Path, Ended]) -> None:
    run = first[0]
    page = read_page(run / "report.html")
    assert page.charts["Loss"][0]["mean"] == pytest.approx(losses(run), rel=1e-6)
    assert page.charts["Loss"][0]["iteration"] == [1, 2, 3, 4, 5, 6]
    assert "finished" in page.text
    assert "text_text_document" in page.text
    assert [event["sources"][0]["documents"] for event in events(run, "start")] == [47]


def test_the_page_is_that_of_the_run_after_it_went_on(run: Path, project: Project) -> None:
    succeed(*options(project, run, train_iters=8, resume=run / "iter_0000003", lr=5e-4))
    left = (run / "report.html").read_text("utf-8")
    curve = parse_page(left).charts["Learning rate"][0]
    assert curve["iteration"] == list(range(1, 9))
    assert curve["mean"] == [1e-3] * 3 + [5e-4] * 5
    # The run has kept count by itself; the files alone give the same page.
    assert write_report(run).read_text("utf-8") == left
