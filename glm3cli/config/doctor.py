"""`DoctorConfig`: the options of `glm3 doctor`."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag
from glm3cli.config.launch import LaunchConfig

PANEL = "Self-test"


class DoctorConfig(LaunchConfig):
    """The options of `glm3 doctor`."""

    as_json: Annotated[bool, Flag(name="json")] = Field(
        default=False, description="The findings as one JSON object."
    )
    numerics: Annotated[bool, Flag(panel=PANEL)] = Field(
        default=False,
        description="Run every operator, collective, and a small model on the device, and compare "
        "them with plain math in fp64.",
    )
    chip_file: Annotated[Path | None, Flag(panel=PANEL, metavar="FILE.toml", is_written=True)] = (
        Field(
            default=None,
            description="Measure the device, too, and describe it in a file that --chip takes.",
        )
    )

    @model_validator(mode="after")
    def _check_numerics(self) -> Self:
        if self.numerics:
            return self
        fields = type(self).model_fields
        for name in ("device", "nproc", "chip_file"):
            if getattr(self, name) != fields[name].default:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is for --numerics, which runs on the device")
        return self

    @model_validator(mode="after")
    def _check_file(self) -> Self:
        if self.chip_file is not None and self.chip_file.suffix != ".toml":
            raise ValueError(
                f"--chip-file {self.chip_file}: --chip takes files whose names end in .toml"
            )
        return self
