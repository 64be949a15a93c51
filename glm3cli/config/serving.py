"""The options of `glm3 generate --serve`."""

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag, Settings

SERVER = "Server"
# Where a server answers that isn't told a host: programs on this machine alone.
LOOPBACK = "127.0.0.1"
_ADDRESS = re.compile(r"(?:(?P<host>\[[0-9a-fA-F:.%\w]+\]|[^:\[\]\s/]*):)?(?P<port>\d{1,5})")


class ServeOptions(Settings):
    """The options of a server, all of which go with `--serve`."""

    serve: Annotated[str | None, Flag(panel=SERVER, metavar="HOST:PORT")] = Field(
        default=None,
        description="Answer OpenAI's API there; a PORT alone answers this machine alone.",
    )
    api_key_file: Annotated[Path | None, Flag(panel=SERVER)] = Field(
        default=None, description="File of keys, one a line, of which a client must send one."
    )
    served_model_name: Annotated[str | None, Flag(panel=SERVER)] = Field(
        default=None, description="What clients call the model; default: its folder's name."
    )
    max_queue: Annotated[int, Flag(panel=SERVER)] = Field(
        default=256, ge=0, description="Answers that may wait for a place; more are refused."
    )
    max_request_tokens: Annotated[int | None, Flag(panel=SERVER)] = Field(
        default=None, ge=2, description="Most tokens of a prompt with its answer. [the model's]"
    )
    request_timeout: Annotated[float, Flag(panel=SERVER)] = Field(
        default=600.0, gt=0, description="Seconds after which a request is given up."
    )
    shutdown_timeout: Annotated[float, Flag(panel=SERVER)] = Field(
        default=30.0, ge=0, description="Seconds that running answers have after SIGTERM."
    )
    allow_origin: Annotated[list[str], Flag(panel=SERVER, metavar="ORIGIN")] = Field(
        default=[], description="Web page that may call from a browser, or *; repeat for several."
    )

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port of `serve`."""
        found = _ADDRESS.fullmatch(self.serve or "")
        assert found is not None
        return (found["host"] or LOOPBACK).strip("[]"), int(found["port"])

    @model_validator(mode="after")
    def _check_address(self) -> Self:
        if self.serve is None:
            return self
        found = _ADDRESS.fullmatch(self.serve)
        if found is None or int(found["port"]) > 65535:
            raise ValueError(
                f"--serve {self.serve} is no HOST:PORT, such as 127.0.0.1:8000 or [::1]:8000"
            )
        if self.served_model_name == "":
            raise ValueError("--served-model-name is empty; leave it out, or give a name")
        return self

    @model_validator(mode="after")
    def _check_is_server(self) -> Self:
        if self.serve is not None:
            return self
        for name, field in ServeOptions.model_fields.items():
            if name != "serve" and getattr(self, name) != field.get_default():
                raise ValueError(f"--{name.replace('_', '-')} goes with --serve HOST:PORT")
        return self
