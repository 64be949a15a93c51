"""Turns a config class into a command's options, so that every option is written once.

Every command also has `--config FILE`, a YAML file whose values become the command's defaults:
flags win over them. Of several files, a later one wins over those before it.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic.fields import FieldInfo

from glm3cli.config.base import Flag, Settings, has_paths, unknown_key
from glm3cli.errors import ConfigError
from glm3cli.host.files import expanded
from glm3cli.host.parsing import read_yaml

Config = TypeVar("Config", bound=Settings)

_INDENT = " " * 4  # of code, in a help text
# What rich's markup, in which typer shows texts, would take for a tag: the [eval] of glm3[eval].
_TAG = re.compile(r"\[(?=[a-z#/@])")


def command(
    app: typer.Typer, config: type[Config], name: str, *, epilog: str | None = None
) -> Callable[[Callable[[Config], None]], Callable[[Config], None]]:
    """Returns a decorator that registers `function(config)` on `app` as the command `name`.

    The command's parameters are the option fields of `config` and `--config FILE`; the function is
    called with the checked config. Its docstring is the first part of the help text.

    Args:
        app: The program or group that gets the command.
        config: The class of the command's options.
        name: The word that a user types for the command.
        epilog: Prose with which `--help` ends, as `flowing` takes it.
    """

    def register(function: Callable[[Config], None]) -> Callable[[Config], None]:
        def run(**values: Any) -> None:
            values.pop("config_file")
            fields = config.model_fields
            given = {
                k: v for k, v in values.items() if v is not None or not fields[k].is_required()
            }
            function(config.parse(given))

        parameters = [_parameter(config, key) for key in config.option_fields()]
        run.__signature__ = inspect.Signature([*parameters, _config_file()])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*parameters, _config_file()]}
        run.__doc__ = _TAG.sub(r"\\[", function.__doc__ or "")
        app.command(name, epilog=flowing(epilog) if epilog else None)(run)
        return function

    return register


def flowing(text: str) -> str:
    """Prepares prose for the end of a help text, where the terminal breaks the lines.

    The lines of a paragraph become one line. A line that begins with `- ` begins a new one, and
    lines that are indented by four spaces or more, such as code, stay as they are. Square brackets
    are shown as they are.
    """
    lines: list[str] = []
    for line in inspect.cleandoc(text).splitlines():
        goes_on = bool(lines and lines[-1]) and not lines[-1].startswith(_INDENT)
        if goes_on and line and not line.startswith((_INDENT, "- ")):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return _TAG.sub(r"\\[", "\n".join(lines))


def _parameter(config: type[Settings], key: str) -> inspect.Parameter:
    """Builds the parameter of a command's function that becomes the option of the field `key`."""
    field = config.model_fields[key]
    flag = config.flag_of(key)
    # A missing option is reported by the config, together with everything else that is wrong.
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    # Typer gives a path as text: a Path would have forgotten that it was empty.
    path_type: Any = str if has_paths(field.annotation) else None
    kind: Any
    if flag.positional:
        kind = typer.Argument(
            help=field.description, metavar=flag.metavar, show_default=False, path_type=path_type
        )
    else:
        kind = typer.Option(
            *_spellings(field, flag),
            help=field.description,
            metavar=flag.metavar,
            rich_help_panel=flag.panel,
            path_type=path_type,
        )
    annotation = field.annotation if not field.is_required() else field.annotation | None  # type: ignore[operator]
    if flag.positional and field.is_required():
        annotation, default = field.annotation, inspect.Parameter.empty
    return inspect.Parameter(
        key,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, kind],
    )


def _spellings(field: FieldInfo, flag: Flag) -> list[str]:
    """Returns all spellings of an option, its own name first."""
    name = "--" + str(flag.name).replace("_", "-")
    if field.annotation is bool:
        return [f"{name}/--no-{name.removeprefix('--')}", *flag.aliases]
    return [name, *flag.aliases]


def _config_file() -> inspect.Parameter:
    """Builds the parameter for `--config FILE`."""
    option = typer.Option(
        "--config",
        help="YAML file with options as keys; flags win over it, and a later file too. In its "
        "paths, ~ is expanded, and variables are not.",
        is_eager=True,
        callback=_read_config_files,
        metavar="FILE",
    )
    return inspect.Parameter(
        "config_file",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[list[str] | None, option],
    )


def _read_config_files(context: typer.Context, files: list[str] | None) -> list[str] | None:
    """Makes the values of YAML files the defaults of the command's options.

    Raises:
        ConfigError: A file can't be read, isn't a YAML mapping, or has an unknown key.
    """
    if context.resilient_parsing:
        return files
    for file in files or []:
        values = _read_config_file(context.command.params, file)
        context.default_map = {**(context.default_map or {}), **values}
    return files


def _read_config_file(parameters: Sequence[Any], file: str) -> dict[str, Any]:
    """Returns the values of a YAML file by the names of the command's parameters.

    A list option may have one value. A key without a value leaves what the option has without it.

    Raises:
        ConfigError: The file can't be read, isn't a YAML mapping, or has an unknown key.
    """
    if not file.strip():
        raise ConfigError(
            f"--config {file!r} names no file", "give a YAML file, or leave --config out"
        )
    known = {
        spelling.removeprefix("--").replace("-", "_"): parameter
        for parameter in parameters
        for spelling in parameter.opts
        if parameter.name != "config_file"
    }
    path = Path(expanded(file))
    values: dict[str, Any] = {}
    for key, value in _load_yaml(path).items():
        if key not in known:
            raise ConfigError(f"{path}: {unknown_key(key, known)}", "see --help for the keys")
        if value is None:  # `key:` without a value
            continue
        name, items = str(known[key].name), value if isinstance(value, list) else [value]
        takes_list = getattr(known[key], "multiple", False)
        if not all(isinstance(item, str) for item in items) or not (takes_list or len(items) == 1):
            rule = "a value or a list of values" if takes_list else "one value"
            raise ConfigError(f"{path}: {key} has something else than {rule}", "mend the file")
        if name in values:
            raise ConfigError(f"{path}: {key} is given twice, under two names", "drop one")
        values[name] = items if takes_list else items[0]
    return values


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}", "give a readable file") from None
    except ValueError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}", "mend the file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} holds no mapping", "write one `option: value` a line")
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    if len(named) < len(values):
        raise ConfigError(
            f"--config {path} has a key twice, with dashes and with underscores", "drop one"
        )
    return named
