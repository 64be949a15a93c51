"""`DoctorConfig`: what `glm3 doctor` is asked."""

from typing import Annotated

from pydantic import Field

from glm3cli.config.base import Flag, Settings


class DoctorConfig(Settings):
    """A doctor command."""

    as_json: Annotated[bool, Flag(name="json")] = Field(
        default=False, description="The findings as one JSON object."
    )
