"""`DoctorConfig`: the options of `glm3 doctor`."""

from typing import Annotated

from pydantic import Field

from glm3cli.config.base import Flag, Settings


class DoctorConfig(Settings):
    """The options of `glm3 doctor`."""

    as_json: Annotated[bool, Flag(name="json")] = Field(
        default=False, description="The findings as one JSON object."
    )
