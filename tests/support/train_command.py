"""Runs short trainings by the commands pretrain and finetune."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.project import (
    Ended,
    Project,
    call,
    steps,
)

LR = 1e-3


def options(project: Project, save: Path, command: str = "pretrain", **changes: Any) -> list[Any]:
    """Returns the words of a command that trains six steps; `changes` replaces options.

    The learning rate is constant, so that a longer run has the same first steps.
    """
    values = {
        "model": project.model,
        "data": project.text if command == "pretrain" else project.task,
        "save": save,
        "train_iters": 6,
        "seq_length": 16,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "dtype": "fp32",
        "device": "cpu",
        "lr": LR,
        "lr_decay_style": "constant",
        "save_interval": 3,
        **changes,
    }
    given = {name.replace("_", "-"): value for name, value in values.items() if value is not None}
    return [
        command,
        *(x for name, value in given.items() for x in flag(f"--{name}", value)),
    ]


def flag(name: str, value: Any) -> list[Any]:
    return [name] if value is True else [name, value]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Waits, and ends a run that keeps it waiting, which would go on without its test."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended too early"
        if time.monotonic() > deadline:
            process.terminate()
            pytest.fail("what the run was to do it hasn't done in two minutes")
        time.sleep(0.05)


def has_steps(run: Path, number: int) -> bool:
    """Returns whether a run that goes on has reported so many steps, the last one as a whole."""
    file = run / "metrics.jsonl"
    lines = file.read_text("utf-8").split("\n")[:-1] if file.exists() else []
    return sum('"loss"' in line for line in lines) >= number


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in steps(run)]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("iter_*"))


def succeed(*arguments: Any) -> Ended:
    ended = call(*arguments)
    assert ended.code == 0, ended.err
    return ended
