"""`PartialOptions`: which of the weights are trained."""

import re
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from glm3cli.config.base import Flag, Settings

PARTIAL = "Partial training"


class PartialOptions(Settings):
    """The options for training some of the weights, while the others stay as they are."""

    train_only: Annotated[str | None, Flag(panel=PARTIAL, metavar="REGEX", only="finetune")] = (
        Field(
            default=None,
            description="Train the weights alone whose names in the chatglm layout match somewhere "
            r"(e.g. 'layers\.(26|27)\.').",
        )
    )
    freeze: Annotated[str | None, Flag(panel=PARTIAL, metavar="REGEX", only="finetune")] = Field(
        default=None,
        description="Train all weights but those whose names match (e.g. 'word_embeddings|norm').",
    )

    @property
    def is_partial(self) -> bool:
        """Whether names decide which weights are trained."""
        return self.train_only is not None or self.freeze is not None

    def selects(self, name: str) -> bool:
        """Returns whether these options let a weight be trained.

        Args:
            name: The weight's name in the chatglm layout.
        """
        if self.train_only is not None:
            return re.search(self.train_only, name) is not None
        return self.freeze is None or re.search(self.freeze, name) is None

    @field_validator("train_only", "freeze")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _check_partial(self) -> Self:
        if self.train_only is not None and self.freeze is not None:
            raise ValueError("give --train-only or --freeze, not both")
        return self
