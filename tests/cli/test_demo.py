"""`glm3 demo`, as a user runs it: every check of its table passes."""

import subprocess
import sys

import pytest

STEPS = {"chatglm3": 10, "glm4": 11}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)  # fourteen programs one after the other
@pytest.mark.parametrize("family", STEPS)
def test_the_demo_is_all_green(tmp_path, family):
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    with out.open("w") as stdout, err.open("w") as stderr:
        command = [sys.executable, "-m", "glm3cli", "demo", "--family", family]
        command += ["--keep", str(tmp_path / "demo")]
        code = subprocess.run(command, stdout=stdout, stderr=stderr, check=False).returncode
    assert code == 0, out.read_text() + err.read_text()[-3000:]
    lines = [line for line in out.read_text().splitlines() if "│ ok " in line]
    assert len(lines) == STEPS[family]


def test_a_failed_check_ends_the_demo_with_1(tmp_path, monkeypatch, capsys):
    from glm3cli.config.demo import DemoConfig
    from glm3cli.demo import chain

    monkeypatch.setattr(chain.Chain, "_tokenizer", lambda _self: ("it can't spell", False))
    assert not chain.run_demo(DemoConfig(keep=tmp_path / "demo"))
    shown = capsys.readouterr().out
    assert "it can't spell" in shown
    assert "failed" in shown
    assert "make a random model" not in shown
