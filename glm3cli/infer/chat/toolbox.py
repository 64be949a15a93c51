"""`Toolbox`: the tools that a model may call, and the functions that are run for it, if any."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm3cli.data.tokens.messages import ToolCall
from glm3cli.errors import DataError
from glm3cli.infer.chat.conversation import read_json
from glm3cli.infer.chat.functions import describe_functions

_FORM = 'write [{"name": "...", "description": "...", "parameters": {...}}]'


@dataclass(frozen=True)
class Toolbox:
    """The tools of a chat.

    Attributes:
        tools: The tools as JSON values, as the model sees them; None for none.
        functions: The functions that may be run, by their names; empty unless the user wants it.
    """

    tools: Any = None
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def run(self, call: ToolCall) -> str:
        """Runs the function of a call, and returns what the model reads of its result.

        A string is its own text, any other value is written as JSON. An exception becomes a
        sentence, from which the model can learn what was wrong.
        """
        try:
            result = self.functions[call.name](**call.arguments)
            if isinstance(result, str):
                return result
            return json.dumps(result, ensure_ascii=False, default=str)
        except (Exception, SystemExit) as error:
            return f"Error: {type(error).__name__}: {error}"


def read_tools(path: Path, *, may_run: bool) -> Toolbox:
    """Reads the tools of a JSON file, or of the functions of a Python file.

    Args:
        path: The file; one that ends with .py holds functions.
        may_run: Whether the functions may be run. If not, nothing of the Python file is.

    Raises:
        DataError: The file can't be read, or has something else than tools.
    """
    if path.suffix != ".py":
        return Toolbox(check_tools(read_json(path, "tools"), str(path)))
    tools = describe_functions(path)
    if not may_run:
        return Toolbox(tools)
    module = _import(path)
    return Toolbox(tools, {tool["name"]: getattr(module, tool["name"]) for tool in tools})


def check_tools(value: Any, place: str) -> Any:
    """Returns a JSON value if it is a list of tools, in ChatGLM3's or OpenAI's form.

    Args:
        value: The value.
        place: Where it stands, for the error message.

    Raises:
        DataError: The value is something else, or two tools have one name.
    """
    if not isinstance(value, list):
        raise DataError(f"{place} holds {type(value).__name__}, not a list of tools", _FORM)
    names = []
    for number, tool in enumerate(value, 1):
        name = tool_name(tool)
        if name is None:
            raise DataError(f"{place}: tool {number} has no name", _FORM)
        names.append(name)
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{place} has two tools with the name {twice[0]}", "rename one")
    return value


def tool_name(tool: Any) -> str | None:
    """Returns the name of a tool in ChatGLM3's or OpenAI's form; None if it has none."""
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) and name else None


def _import(path: Path) -> Any:
    """Runs a Python file, and returns the module that it makes.

    Raises:
        DataError: It raises an exception.
    """
    spec = importlib.util.spec_from_file_location("glm3_tools", path)
    assert spec is not None  # which only other endings than .py give
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DataError(
            f"{path} can't be run: {type(error).__name__}: {error}", "mend the file"
        ) from error
    return module
