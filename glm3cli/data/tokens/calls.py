"""Reads the tool calls of an answer, and tells them from text while the answer still comes.

ChatGLM3 calls a tool by a turn whose metadata is the tool's name and whose content is Python code
in a Markdown block (source: process_response of ChatGLM3's modeling_chatglm.py; `chat.call_text`
writes it):

    get_weather
    ```python
    tool_call(city='Beijing', days=3)
    ```

The original evaluates that code. Here nothing is: the code is parsed, and what isn't a call with
the values of JSON stays text. A turn of the tool `interpreter` holds code of any kind, which is
the argument `code` of the call.
"""

import ast
import io
import json
import re
import textwrap
import tokenize
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from glm3cli.data.tokens.chat import Message, parse_reply
from glm3cli.data.tokens.tokenizer import Tokenizer

INTERPRETER = "interpreter"

_NAME = re.compile(r"[\w.-]{1,64}")
_BLOCK = re.compile(r"\s*```[ \t]*\w*[ \t]*\n(?P<code>.*?)(?:```\s*)?", re.DOTALL)
_FENCE, _FUNCTION = "```", "tool_call"
# Words for which Python has others, and those by which repr writes floats that aren't finite.
_WORDS = {"true": True, "false": False, "null": None, "nan": float("nan"), "inf": float("inf")}


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model asks to be called.

    Attributes:
        name: The name of the tool.
        arguments: The arguments by their names, as JSON values.
    """

    name: str
    arguments: dict[str, Any]


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


def to_openai(answer: Sequence[Message]) -> dict[str, Any]:
    """Returns an answer as one assistant turn in OpenAI's form, which training reads, too.

    Args:
        answer: The turns of an answer.

    Returns:
        The turn: `content`, which is None beside calls without text, and `tool_calls` if there are
        any, with their arguments as JSON text.
    """
    calls = [call for message in answer for call in read_calls(message)]
    texts = [m.content if not m.metadata else f"{m.metadata}\n{m.content}" for m in answer]
    text = "\n".join(t for t, m in zip(texts, answer, strict=True) if t and not read_calls(m))
    turn: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
    if calls:
        turn["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for call in calls
        ]
    return turn


class ReplyStream:
    """Turns the tokens of an answer into turns, and gives the text among them as it comes.

    What may become a tool call is held back until it is one, or can't be one any more.

    Attributes:
        calls: The tool calls of the turns that are complete.
        messages: The turns that are complete: one, unless the model has begun another by the token
            `<|assistant|>`, as before a tool call after a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        names: Collection[str] | None = None,
        decoder: Callable[[], Any] | None = None,
    ) -> None:
        """Begins an answer.

        Args:
            tokenizer: The tokenizer.
            names: The tools that may be called; a call of any other one is text. None for all.
            decoder: Returns what decodes the tokens of a turn, with `push` and `finish` as the
                tokenizer's stream decoder has them, which is taken unless another one is given.
        """
        self.messages: list[Message] = []
        self.calls: list[ToolCall] = []
        self._tokenizer = tokenizer
        self._names = names
        self._begin_decoder = decoder or tokenizer.stream_decoder
        self._next = tokenizer.special("<|assistant|>")
        self._has_shown = False
        self._begin()

    def _begin(self) -> None:
        """Begins a turn."""
        self._decoder = self._begin_decoder()
        self._text = ""
        self._num_shown: int | None = None  # None while the turn may become a call

    def push(self, token: int) -> str:
        """Takes one token, and returns the text that has become certain with it."""
        if token == self._next:
            return self._end()
        self._text += self._decoder.push(token)
        if self._num_shown is None and not self._may_be_call():
            self._num_shown = 0
        return self._unshown()

    def finish(self) -> str:
        """Ends the answer, and returns the rest of its text."""
        return self._end()

    def _end(self) -> str:
        """Ends a turn, and returns the rest of its text."""
        self._text += self._decoder.finish()
        message = parse_reply(self._text)
        self.messages.append(message)
        calls = read_calls(message) if self._is_known(message.metadata.strip()) else []
        self.calls += calls
        if self._num_shown is None and not calls:
            self._num_shown = 0
        rest = self._unshown()
        self._begin()
        return rest

    def _may_be_call(self) -> bool:
        """Returns whether the turn can still become a call of a tool that may be called."""
        name, found, _ = self._text.partition("\n")
        if self._names is not None and name.strip():
            known = any(one.startswith(name.strip()) for one in self._names)
            if not known or (found and name.strip() not in self._names):
                return False
        return _may_be_call(self._text)

    def _is_known(self, name: str) -> bool:
        """Returns whether a tool may be called."""
        return self._names is None or name in self._names

    def _unshown(self) -> str:
        """Returns what hasn't been shown of a text, without the empty line of metadata."""
        if self._num_shown is None:
            return ""
        text = self._text
        metadata, found, content = text.partition("\n")
        if found and not metadata.strip():
            text = content.lstrip()
        new = text[self._num_shown :]
        if new and self._num_shown == 0 and self._has_shown:
            new = f"\n{new}"  # a text of another turn stands above
        self._num_shown = len(text)
        self._has_shown = self._has_shown or bool(new)
        return new


def _may_be_call(text: str) -> bool:
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
