"""`TuningOptions`: how long `glm3 finetune` trains, what it shows first, and what it leaves."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from glm3cli.config.base import Flag, Settings

TUNING = "Tuning"


class TuningOptions(Settings):
    """The options for the length of a tuning, its first look at the data, and its result."""

    epochs: Annotated[float | None, Flag(panel=TUNING, only="finetune")] = Field(
        default=None,
        gt=0,
        description="Go through the training data this many times; in place of --train-iters.",
    )
    preview: Annotated[int, Flag(panel=TUNING, only="finetune")] = Field(
        default=1,
        ge=0,
        description="Show this many samples of each data set at the start, token by token.",
    )
    keep_best: Annotated[bool, Flag(panel=TUNING, only="finetune")] = Field(
        default=False,
        description="Save where the validation loss is lower than ever; RUN/best is the newest of "
        "these checkpoints, which --keep-last keeps, too.",
    )
    early_stop: Annotated[int | None, Flag(panel=TUNING, only="finetune")] = Field(
        default=None,
        ge=1,
        description="End after this many validations in a row without a lower loss.",
    )
    export_hf: Annotated[Path | None, Flag(panel=TUNING, only="finetune", metavar="DIR")] = Field(
        default=None,
        description="At the end write the result (with --keep-best the best one) to a folder that "
        "transformers opens.",
    )
