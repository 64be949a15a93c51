"""report.html shows what metrics.jsonl says, on a page that loads nothing."""

import ast
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from glm3cli.train import report
from glm3cli.train.report.charts import HEIGHT, MAX_BUCKETS, WIDTH, Axis, Chart, Curve, number
from glm3cli.train.report.history import History
from glm3cli.train.report.report import MAX_EVENTS, write_report
from tests.support.report_page import Page, parse_page, read_page

NASTY = '</script><img src=x onerror="boom()">&amp;$name'


def step(iteration: int, **changes: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "consumed_tokens": iteration * 64,
        "loss": 8 - iteration / 10,
        "lr": 1e-3,
        "grad_norm": 1.0 + iteration,
        "loss_scale": 1.0,
        "step_time": 0.5,
        "tokens_per_second": 128.0,
        "tokens_per_second_per_device": 64.0,
        "tflops_per_device": 0.25,
        "mfu": None,
        "mfu_causal": None,
        "peak_memory_bytes": 3 * 2**30,
        "data_wait_time": 0.05,
        "forward_backward_time": 0.3,
        "optimizer_time": 0.1,
        "other_time": 0.05,
        **changes,
    }


def valid(iteration: int, loss: float) -> dict[str, Any]:
    return {"iteration": iteration, "validation_loss": loss}


def event(kind: str, **details: Any) -> dict[str, Any]:
    return {"event": kind, "time": 1.7e9, **details}


@pytest.fixture
def make(tmp_path):
    """Writes the two files of a run and makes its page, which is returned."""

    def make(lines: list[dict[str, Any]], settings: str = "train_iters: 4\n") -> Page:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text, "utf-8")
        (tmp_path / "run.yaml").write_text(settings, "utf-8")
        return read_page(write_report(tmp_path))

    return make


def read(tmp_path: Path, lines: list[dict[str, Any]], end: str = "") -> History:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + end, "utf-8")
    return History.read(tmp_path / "metrics.jsonl")


def test_reports_know_nothing_of_the_loop_that_makes_them():
    imported = {
        node.module
        for file in Path(report.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("glm3cli.train")
    }
    below = ("glm3cli.train.progress.", "glm3cli.train.report.")
    assert {name for name in imported if not name.startswith(below)} == set()
    assert imported


# --- what counts ---


def test_what_a_run_repeats_counts_as_it_was_the_last_time(tmp_path):
    first = [step(i, loss=float(i)) for i in range(1, 7)]
    again = [step(i, loss=float(10 * i)) for i in range(4, 6)]
    lines = [*first, valid(4, 4.0), valid(6, 6.0), event("resume", iteration=3), *again]
    history = read(tmp_path, [*lines, valid(4, 40.0)])
    # Step 6 was taken back with the others, though it hasn't come again.
    assert history.steps.iterations == [1, 2, 3, 4, 5]
    assert history.steps.columns["loss"] == [1, 2, 3, 40, 50]
    assert history.validations.iterations == [4]
    assert history.validations.columns["validation_loss"] == [40.0]


def test_what_a_run_takes_back_is_forgotten_when_the_first_step_comes_again(tmp_path):
    lines = [*map(step, range(1, 7)), valid(6, 6.0), event("resume", iteration=5)]
    history = read(tmp_path, [*lines, step(6, loss=60.0)])
    assert history.steps.iterations == [1, 2, 3, 4, 5, 6]
    assert history.steps.last("loss") == 60.0
    assert history.validations.iterations == []


def test_a_run_that_began_anew_in_the_same_folder_forgets_the_old_one(tmp_path):
    history = read(tmp_path, [*map(step, range(1, 6)), event("start"), step(1), step(2)])
    assert history.steps.iterations == [1, 2]


def test_events_know_where_the_run_was(tmp_path):
    lines = [
        event("start"),
        *map(step, range(1, 6)),
        event("signal", number=15),
        event("start"),
        event("resume", iteration=3),
    ]
    found = [(one.kind, one.iteration) for one in read(tmp_path, lines).events]
    assert found == [("start", 0), ("signal", 5), ("start", 3), ("resume", 3)]


def test_a_torn_line_is_passed_over(tmp_path):
    history = read(tmp_path, [step(1), step(2)], end='{"iteration": 3, "lo')
    assert history.steps.iterations == [1, 2]
    history = read(tmp_path, [step(1)], end='{"iterat' + json.dumps(step(2)) + "\n")
    assert history.steps.iterations == [1]


@pytest.mark.parametrize(
    "line",
    [
        *(b"null", b"1", b"[1]", b"{}", b'"a"', b'{"loss": 1}', b'{"iteration": "1"}', b"\0" * 9),
        *(b"[" * 5000, json.dumps(step(1)).encode() + b"\xff", b'{"iteration": 1, "\xff": 2}'),
    ],
)
def test_what_is_no_line_of_a_run_is_passed_over(line, tmp_path):
    lines = [json.dumps(step(1)).encode(), line, json.dumps(step(2)).encode(), b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    history = History.read(tmp_path / "metrics.jsonl")
    assert history.steps.iterations == [1, 2]


def test_a_run_without_a_step_has_a_page(make, tmp_path):
    assert "No step yet." in make([event("start")]).text
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "run.yaml").unlink()
    assert "not finished" in read_page(write_report(tmp_path)).text


# --- curves ---


def test_few_points_are_drawn_as_they_are(make):
    page = make([step(i, loss=value) for i, value in enumerate((8.0, 4.0, 6.0), 1)])
    assert page.charts["Loss"] == [
        {
            "name": "training",
            "iteration": [1, 2, 3],
            "low": [8, 4, 6],
            "mean": [8, 4, 6],
            "high": [8, 4, 6],
        }
    ]
    [(kind, outline)] = [path for path in page.paths["Loss"] if "line" in path[0]]
    assert kind == "line c0"
    points = [tuple(map(float, pair.split(","))) for pair in outline[1:].split("L")]
    # The axis of steps starts where the first one does; that of the loss has a margin of 6 %.
    assert [x for x, _ in points] == pytest.approx([WIDTH / 3, WIDTH * 2 / 3, WIDTH], abs=0.01)
    expected = [HEIGHT * (8.24 - value) / (8.24 - 3.76) for value in (8, 4, 6)]
    assert [y for _, y in points] == pytest.approx(expected, abs=0.01)


def test_many_points_are_drawn_in_buckets_that_lose_no_spike():
    values: list[float | None] = [math.sin(i / 1000) for i in range(100_000)]
    values[77_777] = 50.0
    [part] = Curve("", range(1, 100_001), values).parts()
    assert len(part) == MAX_BUCKETS
    assert max(bucket.high for bucket in part) == 50
    found = [bucket for bucket in part if bucket.high == 50]
    assert found[0].iteration == 77_800
    assert found[0].low == min(v for v in values[77_600:77_800] if v is not None)
    assert found[0].mean == pytest.approx(sum(filter(None, values[77_600:77_800])) / 200)
    assert part[-1].iteration == 100_000


def test_there_is_no_line_over_steps_without_a_number(make):
    losses = [3.0, 2.5, None, 2.0, None, 1.0]
    page = make([step(i, loss=loss) for i, loss in enumerate(losses, 1)])
    lines = [outline for kind, outline in page.paths["Loss"] if kind.startswith("line")]
    assert [outline.count("L") for outline in lines] == [1, 0, 0]
    assert all(outline.endswith("h0") for outline in lines[1:])  # dots
    assert page.charts["Loss"][0]["iteration"] == [1, 2, 4, 6]


def test_validations_are_a_second_curve(make):
    page = make([step(1), valid(1, 7.5), step(2), valid(2, 7.25)])
    assert [curve["name"] for curve in page.charts["Loss"]] == ["training", "validation"]
    assert page.charts["Loss"][1]["mean"] == [7.5, 7.25]
    assert "7.2500" in page.text


def test_further_means_have_a_chart_for_each_group(make):
    means = {"rewards/chosen": 0.5, "rewards/rejected": -0.5, "source_loss/a": 3.0}
    late = valid(2, 5.0) | {"validation_rewards/chosen": 0.25}
    page = make([step(1), step(2, **means), late, step(3, **means)])
    curves = {curve["name"]: curve for curve in page.charts["Rewards"]}
    assert list(curves) == ["chosen", "rejected", "chosen, validation"]
    assert curves["chosen"]["iteration"] == [2, 3]
    assert curves["rejected"]["mean"] == [-0.5, -0.5]
    assert curves["chosen, validation"]["mean"] == [0.25]
    assert [curve["name"] for curve in page.charts["Source loss"]] == ["a"]


def test_some_charts_are_drawn_only_where_they_show_something(make):
    common = {"Loss", "Learning rate", "Gradient norm", "Tokens per second", "Peak memory, GiB"}
    assert make([step(1), step(2)]).charts.keys() == common
    changing = make([step(1, loss_scale=2.0), step(2, mfu=0.5, mfu_causal=0.4)])
    assert changing.charts.keys() == common | {"Loss scale", "MFU, %"}
    assert [curve["mean"] for curve in changing.charts["MFU, %"]] == [[50], [40]]
    assert changing.charts["Peak memory, GiB"][0]["mean"] == [3, 3]


def test_events_are_marked_on_every_curve_and_listed(make):
    lines = [event("start"), *map(step, range(1, 5)), event("save", iteration=2, path="p/q")]
    page = make([*lines, event("rollback", iteration=4), event("data_order")])
    for paths in page.paths.values():
        marks = [(kind, outline) for kind, outline in paths if kind.startswith("mark")]
        assert marks == [
            ("mark start", "M0.00,0V240"),
            ("mark save", "M500.00,0V240"),
            ("mark rollback", "M1000.00,0V240"),
        ]
    assert "path p/q" in page.text
    assert "data_order" in page.text


def test_a_long_list_of_events_is_cut_and_marks_that_coincide_are_one(make):
    skips = [event("skip", iteration=1 + i // 100) for i in range(MAX_EVENTS + 7)]
    page = make([*map(step, range(1, 11)), *skips])
    assert "7 earlier ones are in metrics.jsonl." in page.text
    assert page.text.count("\nskip\n") == MAX_EVENTS + 1  # and the key
    marks = [kind for kind, _ in page.paths["Loss"] if kind == "mark skip"]
    assert len(marks) == 6


# --- axes ---


@pytest.mark.parametrize("span", [(0, 1), (1, 3), (0.0, 1e-5), (-3.7, 12.1), (0, 123_456)])
def test_ticks_are_round_and_within(span):
    axis = Axis(*span)
    ticks = axis.ticks(4)
    assert 2 <= len(ticks) <= 9
    assert all(-1e-6 <= axis.place(tick) <= 1 + 1e-6 for tick in ticks)
    distance = ticks[1] - ticks[0]
    assert re.match(r"[125]\.0+e", f"{distance:.6e}")


def test_wide_ranges_get_a_logarithmic_axis():
    axis = Axis.of([0.5, 2000.0], from_zero=True, may_log=True)
    assert axis.is_log
    assert axis.ticks(4) == [1, 10, 100, 1000]
    assert axis.place(100) - axis.place(10) == pytest.approx(axis.place(10) - axis.place(1))
    for values, may_log in (([0.5, 2000.0], False), ([0.0, 2000.0], True), ([1.0, 9.0], True)):
        assert not Axis.of(values, from_zero=True, may_log=may_log).is_log


def test_a_value_that_stays_lies_within_its_axis():
    for value in (0.0, 5.0, -2.0):
        assert 0 <= Axis.of([value], from_zero=False, may_log=True).place(value) <= 1


def test_numbers_are_short():
    short = [number(value) for value in (0, 1e-5, 0.12345, 9999, 12_345, 3.2e6, 1.05e11)]
    assert short == ["0", "1e-05", "0.1235", "9999", "12.35k", "3.2M", "105G"]


# --- the page ---


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([event("stop", iteration=4)], "finished"),
        ([event("stop", iteration=3)], "stopped early"),
        ([event("signal", number=15), event("stop", iteration=3)], "stopped by signal 15"),
        (
            [event("signal", number=0, name="--exit-duration"), event("stop", iteration=3)],
            "stopped by --exit-duration",
        ),
        ([], "not finished"),
        ([event("stop", iteration=3), event("start")], "not finished"),
    ],
)
def test_the_page_says_how_the_run_ended(lines, status, make):
    page = make([event("start"), *map(step, range(1, 4)), *lines])
    assert f"\n{status}\n" in page.text


def test_the_page_has_settings_versions_data_and_phases(make):
    source = {
        "prefix": "data/wiki",
        "weight": 0.25,
        "documents": 1234,
        "tokens": 56789,
        "samples": 40,
        "epochs": 1.5,
    }
    sizes = {"command": "pretrain", "parameters": 1000, "tp": 2, "pp": 1, "dp": 4}
    start = event("start", **sizes, glm3="0.1.0", torch="2.7.1", sources=[source])
    page = make([start, step(1), step(2)], "train_iters: 4\nlr: 0.001\ndata:\n- a\n- b\n")
    for text in (
        "pretrain of 1,000 parameters on tp 2 x pp 1 x dp 4",
        "2 / 4",
        "lr\n0.001",
        "data\na, b",
        "torch\n2.7.1",
        "data/wiki\n25.00%\n1,234\n56,789\n40\n1.50",
        "data wait 10.0%\nforward backward 60.0%\noptimizer 20.0%\nother 10.0%",
        "3.00 GiB",
    ):
        assert f"\n{text}\n" in page.text


def test_nothing_that_a_user_names_becomes_markup(make):
    source = {"weight": 1.0, "documents": 1, "tokens": 1, "samples": 1, "epochs": 1.0}
    start = event("start", torch=NASTY, sources=[{"prefix": NASTY, **source}])
    settings = json.dumps({"train_iters": 4, "save": NASTY, NASTY: [NASTY]})
    page = make([start, step(1), event("save", path=NASTY), event(NASTY)], settings)
    assert page.text.count(NASTY) == 8
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 6  # one a chart, and ours


def test_a_curves_name_does_not_end_its_script():
    drawn = Chart(NASTY, [Curve(NASTY, [1], [2.0])]).html(Axis(0, 1))
    assert parse_page(drawn).charts[NASTY][0]["name"] == NASTY


def test_the_page_loads_nothing(make, tmp_path):
    make([event("start"), step(1), step(2), valid(2, 1.0)])
    text = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bfetch\(|XMLHttp|import\(", text)
    page = read_page(tmp_path / "report.html")
    assert not [values for _, values in page.tags if {"src", "href", "data"} & values.keys()]


def test_the_page_is_written_aside(make, tmp_path, monkeypatch):
    make([step(1)])
    before = (tmp_path / "report.html").read_bytes()

    def full(_self: Path, _target: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        make([step(1), step(2)])
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_browser_shows_the_curves(make, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    make([event("start"), *map(step, range(1, 5)), valid(4, 7.0)])
    # The page's own script must have run: the pointer is moved over the first chart.
    page = tmp_path / "report.html"
    moving = (
        "<script>document.querySelector('.plot').dispatchEvent("
        "new PointerEvent('pointermove', {clientX: 1e9}))</script></body>"
    )
    page.write_text(page.read_text("utf-8").replace("</body>", moving), "utf-8")
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    tips = re.findall(r'<div class="tip"[^>]*>([^<]*)</div>', done.stdout)
    assert tips[0] == "step 4  training 7.6\nstep 4  validation 7"
    assert tips[1] == "step 4  0.001"
    assert len(tips) == 5
