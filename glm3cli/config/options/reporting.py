"""`ReportOptions`: the options for what a training reports beside its log and metrics.jsonl."""

import re
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from glm3cli.config.base import Flag, Settings

Tool = Literal["tensorboard", "wandb", "swanlab"]
TOOLS: tuple[Tool, ...] = get_args(Tool)
REPORT = "Reports"
_STEPS = re.compile(r"(\d{1,12}):(\d{1,12})")


class ReportOptions(Settings):
    """The options for experiment trackers, for the peak speed in the MFU, and for profiling."""

    # Typer takes no list of literals: the names are checked below.
    report_to: Annotated[
        list[str], Flag(panel=REPORT, metavar="none|tensorboard|wandb|swanlab")
    ] = Field(
        default=["none"],
        min_length=1,
        description="Also send the metrics to this tool; repeat it for several.",
    )
    peak_tflops: Annotated[float | None, Flag(panel=REPORT)] = Field(
        default=None,
        gt=0,
        description="Peak TFLOP/s of one device, for MFU; default: that of known devices.",
    )
    profile: Annotated[str | None, Flag(panel=REPORT, metavar="START:STOP")] = Field(
        default=None, description="Write a profiler's trace of these steps into RUN/profile."
    )

    @property
    def tools(self) -> list[Tool]:
        """The experiment trackers to report to, each once; empty for none."""
        return [tool for tool in TOOLS if tool in self.report_to]

    @property
    def profile_steps(self) -> range:
        """The optimizer steps to profile, counted from 1; empty if none is to be profiled."""
        if self.profile is None:
            return range(0)
        start, stop = map(int, self.profile.split(":"))
        return range(start, stop + 1)

    @field_validator("profile")
    @classmethod
    def _check_profile(cls, value: str | None) -> str | None:
        if value is not None:
            found = _STEPS.fullmatch(value)
            if found is None or not 1 <= int(found[1]) <= int(found[2]):
                raise ValueError("give START:STOP, two steps counted from 1, e.g. 10:12")
        return value

    @field_validator("report_to")
    @classmethod
    def _check_tools(cls, names: list[str]) -> list[str]:
        unknown = [name for name in names if name not in ("none", *TOOLS)]
        if unknown:
            raise ValueError(f"{unknown[0]} is not one of none, {', '.join(TOOLS)}")
        if "none" in names and len(names) > 1:
            raise ValueError("give none, or the names of tools, not both")
        return names
