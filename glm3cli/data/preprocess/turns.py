"""Reads the turns of a conversation, in all spellings that common data sets have.

They are those of OpenAI (role and content, tool_calls, and the older function_call), ShareGPT and
LLaMA-Factory (from and value), ms-swift (tool_call and tool_response), and ChatGLM3, whose tools'
turns hold both call and result (source: the README of ChatGLM3's finetune_demo).
"""

import json
from collections.abc import Mapping, Sequence
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
from glm3cli.data.preprocess.results import Turn, in_order_of_calls
from glm3cli.data.preprocess.trained import is_trained
from glm3cli.data.preprocess.unread import check_no_media, check_no_other_calls, check_no_thoughts
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
# Where calls have their arguments: OpenAI, ChatGLM3, LangChain, Anthropic.
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_TOOL_TURN = ("parameters", "observation")
_TEXT_PARTS = ("text", "input_text", "output_text")
_CALL_PARTS = {*_ARGUMENTS, "name", "id", "type", "index", "function"}


def read_turns(row: Row, column: str) -> list[Message]:
    """Reads the turns in a column of a row.

    The results of tools get the order of the calls that they name by their ids.

    Raises:
        RowError: It isn't a list of turns, or a turn has none of the forms.
    """
    given = list_of(row, column)
    if not given:
        raise RowError(column, "expected at least one turn, got []")
    turns: list[Turn] = []
    for i, turn in enumerate(given):
        place = f"{column}[{i}]"
        if not isinstance(turn, Mapping):
            raise RowError(place, f"expected an object, got {shown(turn)}")
        check_no_media(turn, place)
        turns.append(Turn(place, turn, _read_turn(turn, place, column)))
    _check_tools(row, turns)
    messages = [message for turn in in_order_of_calls(turns) for message in turn.messages]
    # Else it is a prompt, which shows no earlier thoughts.
    if messages and messages[-1].role == "assistant":
        for turn in turns:
            check_no_thoughts(turn.given, turn.place)
    return messages


def tools_of(row: Row, within: str = "") -> Any:
    """Returns the tools that a row or a turn offers; None for an empty list, as for none.

    Args:
        row: The row, or a turn in it.
        within: Which field of the row the turn is, for error messages; "" for the row itself.

    Raises:
        RowError: They aren't JSON, or tools and functions differ.
    """
    tools, functions = (_tools(row, name, within) for name in ("tools", "functions"))
    if tools and functions and tools != functions:
        place = f"{within}.functions" if within else "functions"
        raise RowError(place, "differ from the tools; give one of them")
    return tools or functions or None


def _tools(row: Row, name: str, within: str) -> Any:
    """Returns the tools in a field, without nulls; a tool may be JSON in a string of its own."""
    tools = json_of(row, name, within)
    if not isinstance(tools, list):
        return tools
    place = f"{within}.{name}" if within else name
    return [
        parsed(tool, f"{place}[{i}]") if _is_object(tool) else tool
        for i, tool in enumerate(tools)
        if tool is not None
    ]


def _is_object(tool: Any) -> bool:
    """Returns whether a tool is written as the JSON text of an object."""
    return isinstance(tool, str) and tool.lstrip().startswith("{")


def _check_tools(row: Row, turns: Sequence[Turn]) -> None:
    """Raises RowError if a turn has tools that neither the row nor a system turn offers."""
    for turn in turns:
        tools = tools_of(turn.given, turn.place)
        if tools is None:
            continue
        read = [message.tools for one in turns for message in one.messages]
        if tools not in (tools_of(row), *read):
            problem = "are read of the row and of a system turn alone; give them there"
            raise RowError(f"{turn.place}.tools", problem)


def _read_turn(turn: Row, place: str, column: str) -> list[Message]:
    """Reads one turn, which may become several: a text, and every call of a tool."""
    speaker = _speaker(turn, place, column)
    role, loss = _SPEAKERS[speaker], is_trained(turn, place)
    default = "value" if column == "conversations" else "content"
    said = _only_text(turn, place) or default
    if speaker in _CALLERS and said in turn:
        return _calls(turn[said], place, loss)
    if speaker == "tool" and _holds_call(turn, said, place):
        return _tool_turn(turn, place, loss)
    calls: list[Message] = []
    if role == "assistant":
        for key in _CALL_KEYS:
            calls += _calls(turn.get(key), f"{place}.{key}", loss)
        check_no_other_calls(turn, place)
    text = _text(turn, said, place, optional=bool(calls))
    if calls and not text:
        return calls
    metadata = text_of(turn, "metadata", optional=True, within=place)
    tools = tools_of(turn, place) if role == "system" else None
    return [Message(role, text, metadata, tools, loss), *calls]


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
    """Returns what a turn says: a string, or a list of strings and OpenAI's parts of text."""
    parts = turn.get(said)
    if not isinstance(parts, list):
        return text_of(turn, said, optional, place)
    texts = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping) or part.get("type") not in _TEXT_PARTS:
            raise RowError(f"{place}.{said}[{i}]", f"expected a part of text, got {shown(part)}")
        texts.append(text_of(part, "text", within=f"{place}.{said}[{i}]"))
    return "".join(texts)


def _holds_call(turn: Row, said: str, place: str) -> bool:
    """Returns whether a turn of a tool is ChatGLM3's, which has a call instead of a text.

    Raises:
        RowError: It has both.
    """
    if not turn.get(said):
        return first_of(turn, _TOOL_TURN) is not None
    if any(turn.get(key) for key in _TOOL_TURN):
        problem = f"stands beside {' and '.join(_TOOL_TURN)}: give them, or a text"
        raise RowError(f"{place}.{said}", problem)
    return False


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
