"""`DemoConfig`: the options of `glm3 demo`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from glm3cli.config.base import Settings

Family = Literal["chatglm3", "glm4"]


class DemoConfig(Settings):
    """The options of `glm3 demo`."""

    family: Family = Field(
        default="chatglm3",
        description="The kind of model and tokenizer: ChatGLM3's, or GLM-4-9B's, which also calls "
        "a tool.",
    )
    keep: Path | None = Field(
        default=None, description="Keep all files in this (new) folder instead of removing them."
    )
