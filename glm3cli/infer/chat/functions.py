"""Describes the functions of a Python file as tools, by its syntax: nothing of it is run."""

import ast
import re
from pathlib import Path
from typing import Any

from glm3cli.errors import DataError

# The types of JSON schema by the names of Python's.
_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "List": "array",
    "tuple": "array",
    "dict": "object",
    "Dict": "object",
}
_ARGUMENT = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?\s*:\s*(.+)$")


def describe_functions(path: Path) -> list[dict[str, Any]]:
    """Returns a tool for each public function that stands in a Python file.

    A tool has the function's name, the first paragraph of its docstring, and its parameters as a
    JSON schema, with the types of the annotations and the sentences of the docstring's `Args`.

    Raises:
        DataError: The file can't be read, isn't Python, has no public function, or has one that
            can't be called by the names of its parameters.
    """
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "give a Python file of functions") from None
    except (SyntaxError, ValueError) as error:
        raise DataError(f"{path} is no Python: {error}", "mend the file") from None
    tools = []
    for node in tree.body:
        name = getattr(node, "name", "")
        if isinstance(node, ast.AsyncFunctionDef) and not name.startswith("_"):
            raise DataError(f"{path}:{node.lineno}: {name} is async", "make it a plain function")
        if isinstance(node, ast.FunctionDef) and not name.startswith("_"):
            tools.append(_describe(node, path))
    if not tools:
        raise DataError(
            f"{path} has no public function",
            "write one for each tool; a function whose name begins with _ isn't shown to the model",
        )
    return tools


def _describe(function: ast.FunctionDef, path: Path) -> dict[str, Any]:
    """Returns the tool for a function.

    Raises:
        DataError: The function can't be called by the names of its parameters.
    """
    arguments = function.args
    if arguments.vararg or arguments.kwarg or arguments.posonlyargs:
        raise DataError(
            f"{path}:{function.lineno}: {function.name} has parameters without a name of their own",
            "a model calls a tool by the names of its parameters: don't use *, ** and /",
        )
    text = ast.get_docstring(function) or ""
    told = _told(text)
    positional, keyword = arguments.args, arguments.kwonlyargs
    num_required = len(positional) - len(arguments.defaults)
    required = [one.arg for one in positional[:num_required]]
    required += [
        one.arg
        for one, default in zip(keyword, arguments.kw_defaults, strict=True)
        if default is None
    ]
    properties = {}
    for one in (*positional, *keyword):
        about = {"description": told[one.arg]} if one.arg in told else {}
        properties[one.arg] = {**about, **_schema(one.annotation)}
    return {
        "name": function.name,
        "description": " ".join(text.partition("\n\n")[0].split()),
        "parameters": {"type": "object", "properties": properties, "required": required},
    }


def _told(docstring: str) -> dict[str, str]:
    """Returns what the section `Args` of a docstring says of each parameter."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", docstring, re.MULTILINE)
    told: dict[str, str] = {}
    name, indent = "", None
    for line in section[1].splitlines() if section else []:
        found = _ARGUMENT.match(line)
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        if found and depth == indent:
            name = found[1]
            told[name] = found[2].strip()
        elif name and line.strip():
            told[name] += f" {line.strip()}"
    return told


def _schema(annotation: ast.expr | None) -> dict[str, Any]:
    """Returns the JSON schema of an annotation; {} for one that isn't known."""
    match annotation:
        case ast.Constant(value=str() as text):  # written as a string
            try:
                return _schema(ast.parse(text, mode="eval").body)
            except SyntaxError:
                return {}
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in _TYPES:
            return {"type": _TYPES[name]}
        case ast.BinOp(op=ast.BitOr(), left=left, right=ast.Constant(value=None)):
            return _schema(left)
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=inner):
            return _generic(name, inner)
    return {}


def _generic(name: str, inner: ast.expr) -> dict[str, Any]:
    """Returns the JSON schema of `name[inner]`, such as `list[str]`."""
    if name == "Optional":
        return _schema(inner)
    if name == "Literal":
        items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        return {"enum": [item.value for item in items if isinstance(item, ast.Constant)]}
    schema = _schema(ast.Name(id=name))
    if schema.get("type") == "array" and name in ("list", "List") and _schema(inner):
        schema["items"] = _schema(inner)
    return schema
