"""Defines `Settings`, the base class of every config, and `Flag`, a field's command-line details.

A config class is the single source of an option: its field gives the name (`seq_length` is
`--seq-length` and the YAML key `seq_length`), the type, the default, the limits, and the help text
(the field's description).
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from glm3cli.errors import ConfigError
from glm3cli.host.files import expanded, place_trouble

_LARGEST = 2**63 - 1  # of all whole numbers: C's types hold no larger ones
# What stands before a path, a weight or a name, and the path. Elsewhere a `=` belongs to the path.
_PATH = re.compile(r"(\d+(?:\.\d+)?:|[\w.-]+=(?=[~$]))?(.*)", re.S)
# A shell's variable where a part of a path begins, such as ${HOME}/run.
_VARIABLE = re.compile(r"(?:^|/)(\$(?:\{[^}/]*\}?|[A-Za-z_]\w*))")


@dataclass(frozen=True)
class Flag:
    """The command-line details of a config's field, given as `Annotated[type, Flag(...)]`.

    Attributes:
        aliases: Further spellings of the option, with their dashes.
        positional: Whether the field is a positional argument instead of an option.
        panel: The heading under which `--help` lists the option.
        metavar: The placeholder that `--help` shows for the value.
        name: The option's name if it differs from the field's (`json`, which pydantic has taken).
        only: The one command that has the option, of those that share the config; None if all do.
        is_path: Whether a text value may be a path, whose `~` is expanded as in a field of paths.
        is_written: Whether a file is written at the path, which is refused if none can be.
    """

    aliases: tuple[str, ...] = ()
    positional: bool = False
    panel: str | None = None
    metavar: str | None = None
    name: str | None = None
    only: str | None = None
    is_path: bool = False
    is_written: bool = False

    @property
    def spelling(self) -> str:
        """The option as a user types it, such as `--seq-length`, or an argument's placeholder."""
        if self.positional and self.metavar:
            return self.metavar
        return "--" + str(self.name).replace("_", "-")


class Settings(BaseModel):
    """The base class of all configs: frozen and strict, and it refuses unknown keys.

    The description of each field is its help text on the command line.

    Attributes:
        command: The command whose options these are, where some of the fields are options of one
            command alone.
    """

    command: ClassVar[str | None] = None

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        defer_build=True,  # a command needs one config of the dozen that are imported
    )

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, values: Any) -> Any:
        """Refuses whole numbers that no file could hold, and reads paths as `_read_path` does.

        Places where no file can be written are refused here, too, before any work is done.
        """
        if not isinstance(values, dict):
            return values
        read = dict(values)
        for name in values.keys() & cls.model_fields.keys():
            value, flag = values[name], cls.flag_of(name)
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise ValueError(f"{flag.spelling} {value}: should be at most {_LARGEST}")
            if flag.is_path:
                read[name] = _read_each(value, flag, str)
            elif has_paths(cls.model_fields[name].annotation):
                read[name] = _read_each(value, flag, Path)
        for name, field in cls.model_fields.items():
            value, flag = read.get(name, field.default), cls.flag_of(name)
            if flag.is_written and isinstance(value, Path) and (trouble := place_trouble(value)):
                raise ValueError(f"{flag.spelling} {value}: {trouble}")
        return read

    @classmethod
    def flag_of(cls, field: str) -> Flag:
        """Returns the command-line details of the field `field`, with its option name filled in."""
        metadata = cls.model_fields[field].metadata
        flag = next((item for item in metadata if isinstance(item, Flag)), Flag())
        return replace(flag, name=flag.name or field)

    @classmethod
    def option_fields(cls) -> list[str]:
        """Returns the names of the fields that are options or arguments of the command."""
        return [name for name in cls.model_fields if cls.flag_of(name).only in (None, cls.command)]

    def to_options(self) -> dict[str, Any]:
        """Returns the values by their options' names, as a `--config` file has them.

        Positional arguments are left out. All values are those that JSON knows.
        """
        values = self.model_dump(mode="json")
        flags = {field: self.flag_of(field) for field in self.option_fields()}
        return {
            str(flag.name): values[field] for field, flag in flags.items() if not flag.positional
        }

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, strict: bool = True) -> Self:
        """Checks `values`, which are named by the fields, and builds the config.

        Args:
            values: The values.
            strict: Whether each must have its field's own type; if not, a text may stand for a
                number. For a path it always may.

        Raises:
            ConfigError: Values break rules; the message has a sentence for each of them.
        """
        try:
            return cls.model_validate(dict(values), strict=strict)
        except ValidationError as error:
            problems = [_sentence(cls, details) for details in error.errors()]
            raise ConfigError("; ".join(problems), "see --help for what is allowed") from None
        except UnicodeEncodeError:  # pydantic can't pass on a sentence with such a text
            raise ConfigError(
                "an option has a text with bytes that are no UTF-8",
                "see --help for what is allowed",
            ) from None


def has_paths(annotation: Any) -> bool:
    """Returns whether a field of this type holds a path, or a list of them."""
    return annotation is Path or any(map(has_paths, get_args(annotation)))


def _read_each(value: Any, flag: Flag, kind: type[str] | type[Path]) -> Any:
    """Returns the path or the list of paths of an option as `kind`; other values as they are."""
    if isinstance(value, list):
        return [_read_each(item, flag, kind) for item in value]
    return kind(_read_path(str(value), flag)) if isinstance(value, str | Path) else value


def _read_path(text: str, flag: Flag) -> str:
    """Returns a path with `~` expanded at its start, also behind a weight or a name (`3:~`, `b=~`).

    A shell expands it only where a word begins with it. Variables are the shell's alone.

    Raises:
        ValueError: There is no path, or a variable where a part of it begins.
    """
    before, path = _PATH.fullmatch(text).groups("")  # type: ignore[union-attr]
    if not path.strip():
        raise ValueError(
            f"{flag.spelling} {text!r} names no file or folder; is a variable empty that should?"
        )
    if found := _VARIABLE.search(path):
        raise ValueError(
            f"{flag.spelling} {text}: no shell has filled in {found[1]} here; write out what it "
            "stands for, or give the option on the command line, in double quotes"
        )
    return before + expanded(path)


def _sentence(config: type[Settings], details: ErrorDetails) -> str:
    """Describes one of pydantic's errors with the option's name as a user types it."""
    name = str(details["loc"][0]) if details["loc"] else ""
    if details["type"] == "extra_forbidden":
        return unknown_key(name, config.model_fields)
    flag = config.flag_of(name).spelling if name else ""
    if details["type"] == "missing":
        return f"{flag} is missing"
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{flag} {details['input']}: {message}" if name else message


def unknown_key(key: str, known: Mapping[str, Any]) -> str:
    """Returns the message for an unknown key, with the most similar key of `known`, if any."""
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "")
