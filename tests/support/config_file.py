"""What a command gets from a `--config` file."""

from pathlib import Path
from typing import TypeVar

import typer

from glm3cli.cli.options import command
from glm3cli.config.base import Settings

Config = TypeVar("Config", bound=Settings)


def read(kind: type[Config], file: Path) -> Config:
    """The config that a command taking `kind` makes of the file alone."""
    app, got = typer.Typer(), []

    @command(app, kind, "run")
    def run(config: Config) -> None:
        got.append(config)

    app(["--config", str(file)], standalone_mode=False)
    return got[0]
