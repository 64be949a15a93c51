"""`DemoConfig`: what `glm3 demo` is asked."""

from pathlib import Path

from pydantic import Field

from glm3cli.config.base import Settings


class DemoConfig(Settings):
    """A demo command."""

    keep: Path | None = Field(
        default=None, description="Keep all files in this (new) folder instead of removing them."
    )
