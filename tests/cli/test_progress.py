"""Progress on stderr: a bar on a terminal, otherwise lines."""

import os
import pty
import subprocess
import sys

import pytest

from glm3cli.checkpoint.convert.check import check
from glm3cli.checkpoint.convert.convert import convert
from glm3cli.cli import progress
from glm3cli.cli.progress import Progress, bar_or_lines, byte_progress, progress_lines
from glm3cli.config.convert import ConvertOptions
from glm3cli.data.preprocess.counts import Counts
from glm3cli.data.preprocess.writing.write import PreprocessProgress
from tests.support.checkpoints import SMALL, write_hf


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until its only element is changed."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_five_seconds_and_one_at_the_end(clock, capsys):
    with byte_progress() as report:
        clock[0] += 50  # before the work begins
        report("converting", 0, 4_000_000_000)
        for seconds, done in [(3, 1), (3, 2), (1, 3), (1, 4)]:
            clock[0] += seconds
            report("converting", done * 1_000_000_000, 4_000_000_000)
        report("verifying", 0, 2_000_000_000)
        clock[0] += 6
        report("verifying", 1_000_000_000, 2_000_000_000)
        clock[0] += 1
    assert capsys.readouterr().err.splitlines() == [
        "converting: 2.00 of 4.00 GB, 6 s",
        "converting: 4.00 of 4.00 GB, 8 s",
        "verifying: 1.00 of 2.00 GB, 6 s",
    ]


def test_a_line_per_interval_but_not_more_than_one_a_second(clock, capsys):
    def documents(count):
        return PreprocessProgress(Counts(documents=count), Counts(), seconds=2.0, done=0.25)

    with progress_lines(100) as report:
        report(documents(150))  # within the first second
        clock[0] += 1
        report(documents(99))
        report(documents(200))
        clock[0] += 1
        report(documents(299))
        report(documents(300))
    lines = capsys.readouterr().err.splitlines()
    speeds = "0.0 MB/s  0 tokens/s  6 s left"
    assert lines == [
        f" 25%  200 documents  100 docs/s  {speeds}",
        f" 25%  300 documents  150 docs/s  {speeds}",
    ]


def test_the_core_prints_no_progress(tmp_path, capsys):
    told = []
    hf = write_hf(tmp_path / "hf")
    convert(hf, tmp_path / "mg", ConvertOptions(layout="mcore"), lambda *what: told.append(what))
    total = 2 * SMALL.num_parameters
    for kind in ("converting", "verifying"):
        amounts = [done for what, done, of in told if what == kind and of == total]
        assert amounts == sorted(amounts)
        assert amounts[-1] == total
        assert amounts[0] == 0 or kind == "verifying"  # some was read back before
    assert {what for what, *_ in told} == {"converting", "verifying"}
    check(tmp_path / "mg", lambda *what: told.append(what))
    assert told[-1][:2] == ("checking", total)
    check(tmp_path / "mg")
    assert len(capsys.readouterr().err.splitlines()) == 1  # what the conversion needs


def on_a_terminal(*command):
    """What a command writes to stderr, if that is a terminal."""
    ours, its = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stderr=its, stdout=subprocess.DEVNULL, env=environment) as one:
        os.close(its)
        text = b""
        while True:
            try:
                part = os.read(ours, 10_000)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            text += part
        os.close(ours)
    assert one.returncode == 0, text
    return text.decode()


def test_a_conversion_on_a_terminal_shows_bars(tmp_path):
    hf = write_hf(tmp_path / "hf")
    command = (sys.executable, "-m", "glm3cli", "convert", "hf2mg", hf, tmp_path / "mg")
    text = on_a_terminal(*map(str, command))
    assert "needs 0.02 GB of disk" in text
    assert "verifying" in text
    assert "\x1b[?25l" in text  # the cursor is hidden while there is a bar
    assert "GB, 0 s" not in text


def test_a_bar_is_drawn_only_where_it_may_be(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    seen = []
    with bar_or_lines(
        lambda state: Progress(state, 3.0), seen.append, "count", may_draw=False
    ) as report:
        report(1)
    assert seen == [1]


@pytest.mark.parametrize("unit", ["share", "count", "bytes"])
def test_bars_of_every_unit(monkeypatch, capsys, unit):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    to_bar = {1: Progress(0.5, 1.0, "one"), 2: Progress(1.0, 1.0), 3: Progress(0.0, 2.0, "three")}
    lines = []
    start = Progress(0.0, 1.0, "start")
    with bar_or_lines(to_bar.get, lines.append, unit, start=start) as report:
        for state in (1, 2, 3):
            report(state)
    assert lines == []
    assert "three" in capsys.readouterr().err
