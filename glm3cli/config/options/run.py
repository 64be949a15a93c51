"""`RunOptions`: a run's folder, its checkpoints, its validation, and its log."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from glm3cli.config.base import Flag, Settings

RUN = "Run"
# What makes a run another one; the options of a run that goes on may differ.
IDENTITY = ("command", "model", "data")


SUITES = ("mmlu", "ceval", "cmmlu")


def split_suite(item: str) -> tuple[str, str, int | None]:
    """Returns the name, the folder and the limit of an --eval-suite, NAME=DIR or NAME=DIR:LIMIT.

    Raises:
        ValueError: It has another form, or names another benchmark.
    """
    name, is_there, rest = item.partition("=")
    folder, colon, limit = rest.rpartition(":")
    if not (colon and limit.isdecimal()):
        folder, limit = rest, ""
    if not is_there or not folder:
        raise ValueError(f"{item!r} is no NAME=DIR or NAME=DIR:LIMIT, such as mmlu=mmlu/data:20")
    if name not in SUITES:
        raise ValueError(f"{name!r} is no benchmark; there are {', '.join(SUITES)}")
    if limit and not int(limit):
        raise ValueError(f"{item!r} asks no question; give a limit of 1 or more")
    return name, folder, int(limit) if limit else None


class RunOptions(Settings):
    """The options for a run's folder, its checkpoints, its validation, and its log."""

    save: Annotated[Path, Flag(panel=RUN)] = Field(description="Folder of the run.")
    save_interval: Annotated[int | None, Flag(panel=RUN)] = Field(
        default=None, ge=1, description="Steps between checkpoints; one is written at the end too."
    )
    async_save: Annotated[bool, Flag(panel=RUN)] = Field(
        default=True, description="Write checkpoints while training goes on."
    )
    exit_duration: Annotated[float | None, Flag(panel=RUN)] = Field(
        default=None,
        gt=0,
        description="Minutes after which the run saves and ends (exit code 143).",
    )
    max_skipped: Annotated[int, Flag(panel=RUN)] = Field(
        default=50, ge=1, description="Skipped steps in a row (overflow, NaN) that end the run."
    )
    rollback_on_nan: Annotated[bool, Flag(panel=RUN)] = Field(
        default=False,
        description="Where a loss or gradient is NaN, go back to the newest checkpoint and leave "
        "the batch out.",
    )
    keep_last: Annotated[int | None, Flag(panel=RUN)] = Field(
        default=None, ge=1, description="Keep only this many newest checkpoints."
    )
    resume: Annotated[str, Flag(panel=RUN, metavar="auto|never|CKPT", is_path=True)] = Field(
        default="auto", description="auto continues the run in --save if it has a checkpoint."
    )
    allow_changed: Annotated[list[str], Flag(panel=RUN, metavar="NAME,...")] = Field(
        default=[],
        description="What may differ from the run that goes on: command, model or data, which are "
        "refused else, or an option, which is warned of else.",
    )
    deterministic: Annotated[bool, Flag(panel=RUN)] = Field(
        default=False,
        description="The same bits in every run at the same parallel sizes; slower on some chips.",
    )
    seed: Annotated[int, Flag(panel=RUN)] = Field(
        default=1234, ge=0, lt=2**32, description="Seed of random weights and of the data order."
    )
    eval_interval: Annotated[int | None, Flag(panel=RUN)] = Field(
        default=None, ge=1, description="Steps between validations."
    )
    eval_iters: Annotated[int, Flag(panel=RUN)] = Field(
        default=10, ge=1, description="Batches of one validation."
    )
    eval_suite: Annotated[list[str], Flag(panel=RUN, metavar="NAME=DIR[:LIMIT]", is_path=True)] = (
        Field(
            default=[],
            description="Score on mmlu, ceval or cmmlu after each --eval-interval; LIMIT: the "
            "first questions of each subject. Repeats.",
        )
    )
    log_interval: Annotated[int, Flag(panel=RUN)] = Field(
        default=1, ge=1, description="Steps between log lines; metrics.jsonl has every step."
    )

    @field_validator("eval_suite")
    @classmethod
    def _check_suites(cls, items: list[str]) -> list[str]:
        names = [split_suite(item)[0] for item in items]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]} is given twice")
        return items

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if self.eval_suite and self.eval_interval is None:
            raise ValueError("--eval-suite goes by validations: give --eval-interval, too")
        return self

    @field_validator("allow_changed")
    @classmethod
    def _split_names(cls, items: list[str]) -> list[str]:
        names = (name.strip() for item in items for name in item.split(","))
        return [name.removeprefix("--").replace("-", "_") for name in names]
