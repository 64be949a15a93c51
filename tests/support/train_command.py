"""Runs short trainings by the commands pretrain and finetune."""

from pathlib import Path
from typing import Any

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


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in steps(run)]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("iter_*"))


def succeed(*arguments: Any) -> Ended:
    ended = call(*arguments)
    assert ended.code == 0, ended.err
    return ended
