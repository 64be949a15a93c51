"""`DataOptions`: what a training reads, and how much of it a step takes."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from glm3cli.config.base import Flag, Settings
from glm3cli.config.split import Split

DATA = "Data"


class DataOptions(Settings):
    """The options for the training data, and for how much of it a step takes."""

    data: Annotated[list[str], Flag(aliases=("--data-path",), panel=DATA, is_path=True)] = Field(
        min_length=1,
        description="Prefix of preprocessed files, or a raw file or folder (parquet, jsonl, json, "
        "csv, arrow, txt); repeat as WEIGHT:PREFIX to blend, or give a YAML file with a list.",
    )
    data_cache: Annotated[Path | None, Flag(panel=DATA)] = Field(
        default=None,
        description="Folder for raw --data once it is preprocessed; default: data in --save.",
    )
    split: Annotated[Split, Flag(panel=DATA)] = Field(
        default="949,50,1",
        description="Proportions of training, validation, and test documents.",
    )
    seq_length: Annotated[int, Flag(panel=DATA)] = Field(
        default=2048, ge=2, description="Tokens of one sample."
    )
    micro_batch_size: Annotated[int, Flag(panel=DATA)] = Field(
        default=1, ge=1, description="Samples that one rank runs at once."
    )
    global_batch_size: Annotated[int, Flag(panel=DATA)] = Field(
        default=8, ge=1, description="Samples of one optimizer step, over all ranks."
    )
    shared_storage: Annotated[bool, Flag(panel=DATA)] = Field(
        default=True, description="Accepted; every machine looks at its own disk anyway."
    )
