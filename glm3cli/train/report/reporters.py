"""The tools of `--report-to`: TensorBoard, Weights & Biases, and SwanLab.

Each is imported only where it is asked for. They keep what they write in the run's folder; whether
it is also sent somewhere is up to their own settings (`wandb login`, SWANLAB_MODE=offline, ...).
"""

import importlib
import importlib.util
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from glm3cli.config.reporting import Tool
from glm3cli.errors import ConfigError

PROJECT = "glm3"


class Reporter(Protocol):
    """What a run asks of a tool."""

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one step or of one validation."""

    def close(self) -> None:
        """Writes out what is left."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    package = "tensorboard"

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))
        table = ["| setting | value |", "| --- | --- |"]
        table += [f"| {key} | {value} |" for key, value in settings.items()]
        self._writer.add_text("settings", "\n".join(table))

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """One scalar each."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, named like the run's folder."""

    package = "wandb"

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", run.name),
                dir=str(run),
                config=dict(settings),
                id=_run_id(run / "wandb"),
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"--report-to wandb: {error}", "run `wandb login`, or set WANDB_MODE=offline"
            ) from error
        # wandb's own step only grows: it would drop what a run repeats after going back.
        self._run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """One point of every chart, at `iteration`."""
        self._run.log({"iteration": iteration, **values})

    def close(self) -> None:
        """Waits until everything is written or sent."""
        self._run.finish()


class SwanLab:
    """An experiment of SwanLab, named like the run's folder."""

    package = "swanlab"

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        swanlab: Any = importlib.import_module("swanlab")
        errors: Any = importlib.import_module("swanlab.exceptions")
        try:
            # It talks on stdout, which is for our result; the log that it keeps is our stderr.
            with redirect_stdout(sys.stderr):
                self._run = swanlab.init(
                    project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
                    name=os.environ.get("SWANLAB_EXP_NAME", run.name),
                    log_dir=str(run / "swanlab"),
                    config=dict(settings),
                    id=_run_id(run / "swanlab"),
                    resume="allow",
                    settings=swanlab.Settings(terminal={"proxy_type": "stderr"}),
                )
        # RuntimeError is how it says that nobody is logged in.
        except (RuntimeError, errors.ApiError, errors.AuthenticationError) as error:
            raise ConfigError(
                f"--report-to swanlab: {error}", "run `swanlab login`, or set SWANLAB_MODE=offline"
            ) from error

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """One point of every chart, at `iteration`."""
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        """Waits until everything is written or sent."""
        with redirect_stdout(sys.stderr):
            self._run.finish()


_TOOLS: dict[Tool, type[TensorBoard | Wandb | SwanLab]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "swanlab": SwanLab,
}


def check_installed(tools: Sequence[Tool]) -> None:
    """Imports nothing.

    Raises:
        ConfigError: A tool's package isn't installed.
    """
    missing = [name for name in tools if importlib.util.find_spec(_TOOLS[name].package) is None]
    if missing:
        raise ConfigError(
            f"--report-to {missing[0]}: its package isn't installed",
            f"pip install {' '.join(missing)}",
        )


def open_reporters(tools: Sequence[Tool], run: Path, settings: Mapping[str, Any]) -> list[Reporter]:
    """Opens the tools for a run; `settings` are shown beside its curves.

    Raises:
        ConfigError: A tool doesn't start, e.g. for want of a login.
    """
    return [_TOOLS[name](run, settings) for name in tools]


def _run_id(folder: Path) -> str:
    """The same name at every start of a run, so that its curves go on where they ended."""
    file = folder / "run_id"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(16)[:21], "utf-8")  # SwanLab wants 21 characters
    return file.read_text("utf-8")
