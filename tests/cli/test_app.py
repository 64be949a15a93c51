"""The program as a process: quick, quiet, and with an exit code that means something."""

import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from glm3cli import __main__ as program
from glm3cli.cli.app import app
from glm3cli.version import __version__

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "megatron", "numpy", "pyarrow", "sentencepiece", "transformers"}
# Runs the program with each of the lines, in one process, and says what that has imported.
EACH = """
import contextlib, io, sys
from glm3cli.__main__ import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["glm3", *line.split()]
    code = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            code = end.code
    modules = {name.split(".")[0] for name in sys.modules}
    print(line, code, *sorted(modules & set(%r)), sep="|")
"""


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return start("-m", "glm3cli", *args, **environment)


def start(*args: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "GLM3_DEBUG")}
    return subprocess.run(
        [sys.executable, *args],
        env={**ours, "COLUMNS": "200", **environment},
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


def commands(group: Any = None, name: str = "") -> dict[str, Any]:
    """All commands and groups by what is typed for them."""
    group = typer.main.get_command(app) if group is None else group
    found = {name: group}
    for word, command in getattr(group, "commands", {}).items():
        found |= commands(command, f"{name} {word}".strip())
    return found


def test_help_imports_nothing_heavy():
    done = start("-X", "importtime", "-m", "glm3cli", "--help")
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "glm3cli" in imported
    assert not imported & HEAVY
    assert done.returncode == 0


def test_help_and_wrong_usage_of_every_command_import_nothing_heavy(tmp_path):
    lines = {f"{name} --help": 0 for name in commands()}
    lines |= {f"{name} --no-such-option": 2 for name in commands()}
    # Found out by a config class, not by the parser.
    lines |= {
        "pretrain --train-iters 0": 2,
        "finetune --from-scratch --model-config 6b --data a --save b --train-iters 1 --tp 3": 2,
        "generate --model a --prompt b --stream --json": 2,
        f"generate --model {tmp_path} --prompt b": 3,
        f"pretrain --config {tmp_path}/no.yaml": 2,
        "convert hf2mg a b --layers-per-stage 1,2": 2,
        "preprocess --handler nonsense": 2,
        "eval mmlu": 2,
        "no-such-command": 2,
        "--version": 0,
    }
    done = start("-c", EACH % sorted(HEAVY), stdin="\n".join(lines))
    assert done.stdout.splitlines() == [f"{line}|{code}" for line, code in lines.items()]


def test_every_command_has_a_help_text():
    for name, command in commands().items():
        assert command.help, name
        for parameter in command.params:
            if parameter.name not in ("install_completion", "show_completion"):
                assert parameter.help, f"{name} {parameter.name}"


def test_the_contracts_commands_are_all_there():
    assert {
        "convert hf2mg",
        "convert mg2hf",
        "convert mg2mg",
        "convert inspect",
        "preprocess",
        "pretrain",
        "finetune",
        "generate",
        "eval mmlu",
        "eval ceval",
        "eval cmmlu",
        "eval harness",
        "demo",
        "doctor",
    } <= commands().keys()


def test_version_is_a_result():
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_glm3_is_the_same_program():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert pkgutil.resolve_name(project["scripts"]["glm3"]) is program.main


def test_without_a_command_the_help_is_shown():
    done = run()
    assert "pretrain" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_configuration_is_a_sentence_and_a_hint(tmp_path):
    done = run("pretrain", "--train-iters", "0", "--from-scratch")
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert "--train-iters 0: should be greater than or equal to 1" in error
    assert "--data is missing" in error
    assert hint.startswith("hint: ")


def test_a_missing_model_is_a_sentence_and_a_hint(tmp_path):
    done = run("generate", "--model", str(tmp_path / "no"), "--prompt", "a")
    assert (done.returncode, done.stdout) == (3, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert str(tmp_path / "no") in error
    assert hint.startswith("hint: ")


def test_wrong_usage_names_the_option():
    done = run("generate", "--modle", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--modle" in done.stderr
    assert "--model" in done.stderr.replace("--modle", "")


@pytest.mark.parametrize(("typed", "meant"), [("pretrian", "pretrain"), ("docter", "doctor")])
def test_an_unknown_command_suggests_the_near_one(typed, meant):
    done = run(typed)
    assert (done.returncode, done.stdout) == (2, "")
    assert typed in done.stderr
    assert meant in done.stderr


def test_debug_shows_the_traceback_and_keeps_the_exit_code(tmp_path):
    done = run("generate", "--model", str(tmp_path / "no"), "--prompt", "a", GLM3_DEBUG="1")
    assert (done.returncode, done.stdout) == (3, "")
    assert "Traceback" in done.stderr
    assert "CheckpointError" in done.stderr
    assert "\nerror: " in done.stderr


def test_only_the_first_rank_speaks_where_a_launcher_has_the_others(tmp_path):
    launcher = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    done = run("pretrain", "--train-iters", "0", RANK="1", **launcher)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    assert "error: " in run("pretrain", "--train-iters", "0", RANK="0", **launcher).stderr


def test_without_a_launcher_every_rank_speaks_for_itself():
    assert "error: " in run("pretrain", "--train-iters", "0", RANK="1").stderr


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("OSError(28, 'No space left on device', '/x')", 3, "error: /x: No space left on device\n"),
        ("OSError(24, 'Too many open files')", 4, "may not open as many files at once"),
        ("RuntimeError('[enforce] socket: Too many open files')", 4, "`ulimit -n 4096`"),
    ],
)
def test_an_error_of_the_machine_is_a_sentence(raised, code, said):
    bug = f"""
from glm3cli.cli import app
def app_():
    raise {raised}
app.app = app_
app.main()
"""
    done = start("-c", bug)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr


SHOW = "from glm3cli.cli import app; app.app = lambda: print('湖 \\udcff'); app.main()"


def test_a_terminal_of_another_encoding_shows_what_it_can():
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        done = subprocess.run(
            [sys.executable, "-c", SHOW],
            stdout=terminal,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONIOENCODING": "latin-1"},
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert os.read(ours, 100) == b"? ?\r\n"
    os.close(ours)


def test_a_file_gets_all_characters_and_the_bytes_of_names():
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == "湖 ".encode() + b"\xff\n"


def test_a_bug_keeps_its_traceback():
    bug = "from glm3cli.cli import app; app.app = lambda: 1 / 0; app.main()"
    done = start("-c", bug)
    assert (done.returncode, done.stdout) == (1, "")
    assert "ZeroDivisionError" in done.stderr
    assert "error: " not in done.stderr
