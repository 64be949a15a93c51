"""`glm3 demo`: runs the whole chain at toy size on this machine."""

import sys

import typer

from glm3cli.cli.options import command
from glm3cli.config.demo import DemoConfig


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""

    @command(app, DemoConfig, "demo")
    def demo(config: DemoConfig) -> None:
        """Run the whole chain at toy size on this machine, in about two minutes."""
        from glm3cli.demo.chain import run_demo

        if not run_demo(config):
            sys.exit(1)
