"""`ReportOptions`: what a training reports beside its log and metrics.jsonl."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from glm3cli.config.base import Flag, Settings

Tool = Literal["tensorboard", "wandb", "swanlab"]
REPORT = "Reports"
_STEPS = re.compile(r"(\d{1,12}):(\d{1,12})")


class ReportOptions(Settings):
    """Tools to report to, the peak that MFU goes by, and the steps to profile."""

    report_to: Annotated[
        list[Literal["none", "tensorboard", "wandb", "swanlab"]], Flag(panel=REPORT)
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
        """The tools to report to."""
        return [name for name in dict.fromkeys(self.report_to) if name != "none"]

    @property
    def profile_steps(self) -> range:
        """The iterations to profile, counted from 1."""
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

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        if "none" in self.report_to and self.tools:
            raise ValueError(f"give --report-to none, or --report-to {self.tools[0]}, not both")
        return self
