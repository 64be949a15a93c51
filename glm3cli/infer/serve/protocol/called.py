r"""The grammar of a tool call that must come, in llguidance's dialect of Lark.

A call is written as the model's chat format writes it (see `data.tokens.formats`). GLM-4's is the
name of the tool and its arguments as JSON. ChatGLM3's is the name and a block of Python code with
`tool_call(city='Beijing', days=3)`; there the arguments follow the JSON schema of the tool's
parameters, too: those that are required are there, in the order of the schema, and each value is
one that its schema allows, written as JSON or, where that is plain text, as Python.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from glm3cli.infer.decoding.grammar import WHITESPACE
from glm3cli.infer.decoding.schemas import resolved, with_refs_moved, without_unknown_formats
from glm3cli.infer.serve.protocol.errors import ApiError

# How ChatGLM3 writes texts: as Python's repr does, on one line.
_TEXT = r"""TEXT: /'([^'\\\x00-\x1f\x7f]|\\['"\\nrt])*'/"""
# The names of arguments that no schema names.
_KEY = "KEY: /[A-Za-z_][A-Za-z0-9_]*/"
_NAME = re.compile(r"[\w.-]{1,64}")
_ARGUMENT = re.compile(r"[\w.-]+")
# The keys under which a schema has parts that its other parts name, and where there the schema of
# all parameters stands in that of one.
_SHARED = ("$defs", "definitions")
_WHOLE = "parameters"
PLACE = f"#/$defs/{_WHOLE}"
# The keywords with names of a schema, from which references would begin.
_NAMES = ("$id", "$schema")
# The keywords that say something of several arguments at once.
_JOINT = frozenset(
    (
        "allOf",
        "anyOf",
        "const",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "enum",
        "if",
        "maxProperties",
        "minProperties",
        "not",
        "oneOf",
        "patternProperties",
        "propertyNames",
        "then",
    )
)


def functions_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Returns the functions that tools in OpenAI's or ChatGLM3's form are, by their names.

    Raises:
        ApiError: A tool is no function, has no name that can be called, or the name of another.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function", tool)
        place = f"tools[{index}]"
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise ApiError(f"{place}: only functions can be called", "tools")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ApiError(f"{place}.function.name should have 1 to 64 letters or digits", "tools")
        if name in found:
            raise ApiError(f"{place}: two tools are called {name}", "tools")
        if not isinstance(function.get("parameters", {}), Mapping | None):
            raise ApiError(f"{place}.function.parameters should be a JSON schema", "tools")
        found[name] = function
    return found


def chosen_name(choice: Mapping[str, Any], functions: Mapping[str, Any]) -> str:
    """Returns the name of the tool that `tool_choice` asks for.

    Raises:
        ApiError: It names none, or one that isn't among the tools.
    """
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in functions:
        raise ApiError(
            'tool_choice should be none, auto, required, or {"type": "function", "function": '
            '{"name": "..."}} with the name of one of the tools',
            "tool_choice",
        )
    return str(name)


def call_grammar(
    functions: Mapping[str, Mapping[str, Any]], language: Literal["python", "json"] | None
) -> str:
    """Returns the grammar of one call of one of some functions.

    Args:
        functions: The functions, by their names.
        language: The language in which the model writes calls; None if it knows none.

    Raises:
        ApiError: An argument has a name that can't be written, or the model knows no calls.
    """
    if language is None:
        raise ApiError("this model knows no calls of tools", "tools")
    if language == "json":
        return _json_grammar(functions)
    rules, calls = [], []
    for number, (name, function) in enumerate(functions.items()):
        begin = json.dumps(f"{name}\n```python\ntool_call(", ensure_ascii=False)
        end = json.dumps(")\n```")
        calls.append(f"({begin} args_{number} {end})")
        rules += _arguments(number, function.get("parameters") or {})
    return "\n".join([f"start: {' | '.join(calls)}", *rules, _TEXT, _KEY])


def _json_grammar(functions: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the grammar of one call whose arguments are JSON."""
    calls = []
    for name, function in functions.items():
        begin = json.dumps(f"{name}\n", ensure_ascii=False)
        schema = {"type": "object", **(function.get("parameters") or {})}
        calls.append(f"({begin} {_value(schema)})")
    return f"start: {' | '.join(calls)}"


def _arguments(number: int, schema: Mapping[str, Any]) -> list[str]:
    """Returns the rules for the arguments of one function.

    The rule `args_N` has all arguments; `first_N_K` and `rest_N_K` have those from the K-th on, of
    which a first one stands without a comma in front.

    Raises:
        ApiError: The schema has rules that can't be written as those of single arguments.
    """
    properties, required, other = _parts(schema)
    if not properties:
        if other is False:
            return [f'args_{number}: ""']
        pair = f'KEY "=" {_value(other, schema)}'
        return [f'args_{number}: ({pair} (", " {pair})*)?']
    rules = [f"args_{number}: first_{number}_0"]
    for place, (name, value) in enumerate(properties.items()):
        if not _ARGUMENT.fullmatch(name):
            raise ApiError(f"a tool has an argument {name!r}, which no call can name", "tools")
        pair = f"{json.dumps(f'{name}=', ensure_ascii=False)} {_value(value, schema)}"
        rest = f"rest_{number}_{place + 1}"
        first = f"first_{number}_{place}: {pair} {rest}"
        if name in required:
            after = f'rest_{number}_{place}: ", " {pair} {rest}'
        else:
            first += f" | first_{number}_{place + 1}"
            after = f'rest_{number}_{place}: (", " {pair})? {rest}'
        rules += [first, after]
    last = len(properties)
    return [*rules, f'first_{number}_{last}: ""', f'rest_{number}_{last}: ""']


def _parts(schema: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], Any]:
    """Returns the schemas of the arguments, which must be there, and what others may be.

    Raises:
        ApiError: The schema has rules for the arguments together, or asks for what it forbids.
    """
    try:
        top = resolved(schema)
    except ValueError as error:
        raise ApiError(f"the reference in a tool's parameters {error}", "tools") from None
    joint = [key for key in top if key in _JOINT and top[key]]
    if joint:
        raise ApiError(
            f"the parameters of a tool have {joint[0]} beside their properties, which a call that "
            "must come can't follow; give each parameter in properties",
            "tools",
        )
    properties, asked = top.get("properties"), top.get("required")
    found = dict(properties) if isinstance(properties, Mapping) else {}
    required = [one for one in asked if isinstance(one, str)] if isinstance(asked, list) else []
    other = top.get("additionalProperties", top.get("unevaluatedProperties", True))
    for name in required:
        if name not in found and other is False:
            raise ApiError(f"a tool requires the argument {name!r} and forbids it, too", "tools")
        found.setdefault(name, other)
    return found, required, other


def _value(schema: Any, whole: Mapping[str, Any] | None = None) -> str:
    """Returns the grammar of a value: JSON by its schema, or text as Python writes it.

    Args:
        schema: The schema of the value.
        whole: The schema that it is a part of, to which its references lead; None for itself.

    Raises:
        ApiError: It is no schema.
    """
    if not isinstance(schema, Mapping | bool):
        raise ApiError("a parameter of a tool has no JSON schema", "tools")
    try:
        schema = _by_itself({} if schema is True else schema, whole)
    except ValueError as error:
        raise ApiError(f"the schema of a tool's parameters: {error}", "tools") from None
    if isinstance(schema, Mapping):
        about = {"description", "title", "default", "examples", "type"}
        if schema.get("type") == "string" and not schema.keys() - about:
            return "TEXT"
        schema = {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def _by_itself(schema: Any, whole: Mapping[str, Any] | None) -> Any:
    """Returns the schema of a value as llguidance reads it, with all that its references lead to.

    Raises:
        ValueError: It is nested too deeply.
    """
    schema = without_unknown_formats(schema)
    if whole is None or '"$ref"' not in json.dumps(schema):
        return schema
    own = {key: value for key, value in schema.items() if key not in _SHARED}
    parts = {key: part for key, part in whole.items() if key not in _NAMES}
    definitions = {_WHOLE: without_unknown_formats(parts)}
    return {**with_refs_moved(own, PLACE), "$defs": with_refs_moved(definitions, PLACE)}
