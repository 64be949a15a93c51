"""`DemoConfig`: the options of `glm3 demo`."""

from pathlib import Path

from pydantic import Field

from glm3cli.config.base import Settings


class DemoConfig(Settings):
    """The options of `glm3 demo`."""

    keep: Path | None = Field(
        default=None, description="Keep all files in this (new) folder instead of removing them."
    )
