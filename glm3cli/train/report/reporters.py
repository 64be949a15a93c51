"""The tools of `--report-to`: TensorBoard, Weights & Biases, and SwanLab.

Each is imported only if it is asked for. The tools write into the run's folder; their own settings
(`wandb login`, SWANLAB_MODE=offline, ...) decide whether they also send it somewhere.
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

from glm3cli.config.options.reporting import Tool
from glm3cli.errors import ConfigError

PROJECT = "glm3"


class Reporter(Protocol):
    """A tool that takes the numbers of a run."""

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of a step or of a validation by their names."""

    def close(self) -> None:
        """Writes what is left to be written; the tool can't be used after."""


class TensorBoard:
    """Writes event files of TensorBoard to RUN/tensorboard."""

    package = "tensorboard"

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        """Opens an event file in the folder `run`, and writes the settings as a table."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))
        table = ["| setting | value |", "| --- | --- |"]
        table += [f"| {key} | {value} |" for key, value in settings.items()]
        self._writer.add_text("settings", "\n".join(table))

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Writes each number as a scalar."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class Wandb:
    """Writes a run of Weights & Biases to RUN/wandb; its name is that of the run's folder."""

    package = "wandb"

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        """Starts the run, or goes on with the one that was started from the folder `run` before.

        Raises:
            ConfigError: Weights & Biases doesn't start, for want of a login, say.
        """
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
        """Adds each number to its chart, at `iteration`."""
        self._run.log({"iteration": iteration, **values})

    def close(self) -> None:
        """Waits until everything is written or sent."""
        self._run.finish()


class SwanLab:
    """Writes an experiment of SwanLab to RUN/swanlab; its name is that of the run's folder."""

    package = "swanlab"

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        """Starts the experiment, or goes on with the one of the folder `run`.

        Raises:
            ConfigError: SwanLab doesn't start, for want of a login, say.
        """
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
        """Adds each number to its chart, at `iteration`."""
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
    """Checks that the packages of the tools are installed, without importing them.

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
    """Opens the tools for a run.

    Args:
        tools: The names of the tools.
        run: The folder of the run.
        settings: The options of the run, which the tools show beside its curves.

    Raises:
        ConfigError: A tool doesn't start, for want of a login, say.
    """
    return [_TOOLS[name](run, settings) for name in tools]


def _run_id(folder: Path) -> str:
    """Returns a random id that stays the same at every start of a run.

    So its curves go on where they ended. The id is kept in a file of `folder`.
    """
    file = folder / "run_id"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(16)[:21], "utf-8")  # SwanLab wants 21 characters
    return file.read_text("utf-8")
