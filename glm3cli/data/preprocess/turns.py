"""Reads the turns of a conversation, in all spellings that common data sets have.

They are those of OpenAI (role and content, tool_calls, and the older function_call), ShareGPT and
LLaMA-Factory (from and value), ms-swift (tool_call and tool_response), and ChatGLM3, whose tools'
turns hold both call and result (source: the README of ChatGLM3's finetune_demo).
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from glm3cli.data.preprocess.fields import (
    Row,
    RowError,
    check_json,
    first_of,
    json_of,
    list_of,
    listed,
    only_one,
    parsed,
    shown,
    text_of,
)
from glm3cli.data.preprocess.trained import is_trained
from glm3cli.data.tokens.messages import ROLES, Message, Role

_SPEAKERS: dict[str, Role] = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "developer": "system",
    "tool": "observation",
    "function": "observation",
    "tool_response": "observation",
    # Their text is a call as JSON.
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLERS = ("function_call", "tool_call")
_CALL_KEYS = ("tool_calls", "function_call")
# A turn's other keys that name tools, but hold no call.
_TOOL_KEYS = {*_CALL_KEYS, "tool_call_id", "tool_name", "tools", "functions"}
# Where calls have their arguments: OpenAI, ChatGLM3, LangChain, Anthropic.
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_TOOL_TURN = ("parameters", "observation")
_CALL_WORD = re.compile("tool|call(?!ed|er|back)", re.IGNORECASE)
_CALL_PARTS = {*_ARGUMENTS, "name", "id", "type", "index", "function"}


def read_turns(row: Row, column: str) -> list[Message]:
    """Reads the turns in a column of a row.

    Raises:
        RowError: It isn't a list of turns, or a turn has none of the forms.
    """
    turns = list_of(row, column)
    if not turns:
        raise RowError(column, "expected at least one turn, got []")
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        place = f"{column}[{i}]"
        if not isinstance(turn, Mapping):
            raise RowError(place, f"expected an object, got {shown(turn)}")
        messages += _read_turn(turn, place, column)
    return messages


def tools_of(row: Row) -> Any:
    """Returns the tools that a row or a turn offers; None for an empty list, as for none.

    Raises:
        RowError: They aren't JSON, or tools and functions differ.
    """
    tools, functions = json_of(row, "tools"), json_of(row, "functions")
    if tools and functions and tools != functions:
        raise RowError("functions", "differ from the tools; give one of them")
    return tools or functions or None


def _read_turn(turn: Row, place: str, column: str) -> list[Message]:
    """Reads one turn, which may become several: a text, and every call of a tool."""
    speaker = _speaker(turn, place, column)
    role, loss = _SPEAKERS[speaker], is_trained(turn, place)
    default = "value" if column == "conversations" else "content"
    said = _only_text(turn, place) or default
    if speaker in _CALLERS and said in turn:
        return _calls(turn[said], place, loss)
    if speaker == "tool" and turn.get(said) is None and first_of(turn, _TOOL_TURN):
        return _tool_turn(turn, place, loss)
    calls: list[Message] = []
    if role == "assistant":
        for key in _CALL_KEYS:
            calls += _calls(turn.get(key), f"{place}.{key}", loss)
        _check_no_other_calls(turn, place)
    text = _text(turn, said, place, optional=bool(calls))
    if calls and not text:
        return calls
    metadata = text_of(turn, "metadata", optional=True, within=place)
    return [Message(role, text, metadata, tools_of(turn), loss), *calls]


def _speaker(turn: Row, place: str, column: str) -> str:
    """Returns who speaks, in one of the spellings of `_SPEAKERS`."""
    names = [key for key in ("role", "from") if turn.get(key) is not None]
    for key in names:
        if not isinstance(turn[key], str) or turn[key] not in _SPEAKERS:
            expected = f"expected one of {', '.join(_SPEAKERS)}"
            raise RowError(f"{place}.{key}", f"{expected}, got {shown(turn[key])}")
    if not names:
        key = "from" if column == "conversations" else "role"
        raise RowError(f"{place}.{key}", f"is missing; {place} has {listed(turn)}")
    if len({_SPEAKERS[turn[key]] for key in names}) > 1:
        raise RowError(place, f"has role {turn['role']!r}, but from {turn['from']!r}")
    speaker: str = turn[names[-1]]
    return speaker


def _only_text(turn: Row, place: str) -> str | None:
    """Returns the key of a turn's text; an empty text doesn't count beside another."""
    if turn.get("content") == "" or turn.get("value") == "":
        turn = {key: turn.get(key) or None for key in ("content", "value")}
    return only_one(turn, ("content", "value"), place)


def _text(turn: Row, said: str, place: str, *, optional: bool) -> str:
    """Returns what a turn says: a string, or OpenAI's list of parts, all of them text."""
    parts = turn.get(said)
    if not isinstance(parts, list):
        return text_of(turn, said, optional, place)
    texts = []
    for i, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise RowError(f"{place}.{said}[{i}]", f"expected a part of text, got {shown(part)}")
        texts.append(text_of(part, "text", within=f"{place}.{said}[{i}]"))
    return "".join(texts)


def _tool_turn(turn: Row, place: str, loss: bool) -> list[Message]:
    """Reads ChatGLM3's turn of a tool: its call, and what it returned, if that is there."""
    call = {key: turn.get(key) for key in ("name", "parameters")}
    messages = [_call(call, place, loss)]
    observation = turn.get("observation")
    if observation is not None:
        check_json(observation, f"{place}.observation")
        if not isinstance(observation, str):
            observation = json.dumps(observation, ensure_ascii=False)
        messages.append(Message("observation", observation))
    return messages


def _calls(calls: Any, place: str, loss: bool) -> list[Message]:
    """Reads one call or a list of calls, which may be JSON in a string; none for null."""
    if isinstance(calls, str):
        calls = parsed(calls, place) if calls.strip() else None
    if not isinstance(calls, list):
        return [_call(calls, place, loss)] if calls else []
    return [_call(call, f"{place}[{i}]", loss) for i, call in enumerate(calls)]


def _call(call: Any, place: str, loss: bool) -> Message:
    """Returns the assistant's turn that calls a tool: its name, and its arguments by name.

    Raises:
        RowError: The call has no name, or its arguments can't be found or aren't an object.
    """
    function = call.get("function") or call if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(place, f"expected a call with name and arguments, got {shown(function)}")
    key = only_one(function, _ARGUMENTS, place)
    others = [name for name, value in function.items() if value is not None]
    unknown = [name for name in others if name not in _CALL_PARTS]
    if key is None and unknown:
        expected = f"expected the arguments of the call in {', '.join(_ARGUMENTS)}"
        raise RowError(place, f"{expected}; it has {', '.join(others)}")
    arguments = (json_of(function, key, place) if key else None) or {}
    if not isinstance(arguments, Mapping):
        raise RowError(f"{place}.{key}", f"expected an object, got {shown(arguments)}")
    return Message("assistant", "", function["name"], loss=loss, arguments=arguments)


def _check_no_other_calls(turn: Row, place: str) -> None:
    """Raises RowError if an answer has a key that seems to hold calls, but isn't known."""
    for key, value in turn.items():
        if value and key not in _TOOL_KEYS and _CALL_WORD.search(key):
            raise RowError(f"{place}.{key}", "isn't known; give the calls of tools as tool_calls")
