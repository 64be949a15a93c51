r"""Calls of tools as ChatGLM3 writes them: Python code in a Markdown block.

A turn whose metadata is the tool's name has as content (source: process_response of ChatGLM3's
modeling_chatglm.py; `call_text` writes it):

    ```python
    tool_call(city='Beijing', days=3)
    ```

The original evaluates that code. Here nothing is: the code is parsed, and what isn't a call with
the values of JSON stays text. A turn of the tool `interpreter` holds code of any kind, which is
the argument `code` of the call.
"""

import ast
import io
import re
import textwrap
import tokenize
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from glm3cli.data.tokens.messages import Message, ToolCall

INTERPRETER = "interpreter"

_NAME = re.compile(r"[\w.-]{1,64}")
_BLOCK = re.compile(r"\s*```[ \t]*\w*[ \t]*\n(?P<code>.*?)(?:```\s*)?", re.DOTALL)
_FENCE, _FUNCTION = "```", "tool_call"
# Words for which Python has others, and those by which repr writes floats that aren't finite.
_WORDS = {"true": True, "false": False, "null": None, "nan": float("nan"), "inf": float("inf")}


def call_text(arguments: Mapping[str, Any]) -> str:
    """Returns the content of a turn that calls a tool; the tool's name is the turn's metadata."""
    listed = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"```python\ntool_call({listed})\n```"


def read_calls(message: Message) -> list[ToolCall]:
    """Returns the calls that an assistant turn consists of; none if it is text.

    A call may have several lines, and a turn several calls. The end of the code block may be
    missing, and so may the whole block around calls that are complete.
    """
    name = message.metadata.strip()
    if message.role != "assistant" or not _NAME.fullmatch(name):
        return []
    block = _BLOCK.fullmatch(message.content)
    code = textwrap.dedent(block["code"] if block else message.content).strip()
    try:
        return [ToolCall(name, arguments) for arguments in _arguments(code)]
    # What tokenize and ast.parse raise for text that isn't Python, and for what is nested deeply.
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError):
        return [ToolCall(name, {"code": code})] if block and name == INTERPRETER else []


def may_be_call(text: str) -> bool:
    """Returns whether a turn that begins with `text` can still become a call."""
    name, found, content = text.partition("\n")
    if not found:
        return not name.strip() or _NAME.fullmatch(name.strip()) is not None
    content = content.lstrip()
    openings = [word[: len(content)] for word in (_FENCE, _FUNCTION)]
    return _NAME.fullmatch(name.strip()) is not None and content.startswith(tuple(openings))


def _arguments(code: str) -> Iterator[dict[str, Any]]:
    """Yields the arguments of each call that Python code consists of.

    Raises:
        SyntaxError: The code isn't Python.
        tokenize.TokenError: A bracket or a string isn't closed.
        ValueError: The code is no list of calls with JSON values.
    """
    code, names = _with_plain_names(code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # '\d' is what it looks like
        statements = ast.parse(code).body
    if not statements:
        raise ValueError("no call")
    for statement in statements:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError("a statement is no call")
        if call.func.id != _FUNCTION or call.args or not all(one.arg for one in call.keywords):
            raise ValueError("a call has another name, or arguments without names")
        pairs = [(names[str(one.arg)], _json_value(one.value)) for one in call.keywords]
        if len(dict(pairs)) < len(pairs):
            raise ValueError("an argument is there twice")
        yield dict(pairs)


def _with_plain_names(code: str) -> tuple[str, dict[str, str]]:
    """Gives every argument of a call a name that Python allows, which `from` and `a-b` aren't.

    Returns:
        The code, and the old names by the new ones.

    Raises:
        tokenize.TokenError: A bracket or a string isn't closed.
        SyntaxError: The lines are indented in a way that Python doesn't know.
        ValueError: A name is empty or has a quotation mark.
    """
    starts = [0]
    for line in io.StringIO(code):
        starts.append(starts[-1] + len(line))
    names: dict[str, str] = {}
    new, written, depth, begin = "", 0, 0, 0
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        start, end = (starts[row - 1] + column for row, column in (token.start, token.end))
        if token.type != tokenize.OP:
            continue
        depth += (token.string in "([{") - (token.string in ")]}")
        if token.string == "=" and depth == 1:
            name, given = f"_{len(names)}", code[begin:start].strip()
            if not given or set(given) & set("'\""):
                raise ValueError("an argument has no name")
            names[name] = given
            new, written = f"{new}{code[written:begin]}{name}", start
        if depth == 1 and token.string in "(,":
            begin = end
    return new + code[written:], names


def _json_value(node: ast.expr) -> Any:
    """Returns the JSON value that an expression writes.

    Raises:
        ValueError: It writes no such value.
    """
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=word) if word in _WORDS:
            return _WORDS[word]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _json_value(operand)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_json_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            named = [(key.value, _json_value(value)) for key, value in pairs if _is_text(key)]
            if len(named) == len(keys):
                return dict(named)
    raise ValueError("no value of JSON")


def _is_text(node: ast.expr | None) -> TypeGuard[ast.Constant]:
    """Returns whether an expression writes a string."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
