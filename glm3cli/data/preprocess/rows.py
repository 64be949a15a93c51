"""Turns rows of common data sets into texts and conversations.

There is one function for each form of row, and `handlers` chooses among them. No function here
deals with tokens.
"""

import json
from collections.abc import Mapping
from typing import Any

from glm3cli.data.tokens.chat import ROLES, Message, Role, call_text, system_turn

Row = Mapping[str, Any]

_SHARE_GPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "observation",
    "tool": "observation",
}
_OPENAI_ROLES: dict[str, Role] = {
    **{role: role for role in ROLES},
    "developer": "system",
    "tool": "observation",
    "function": "observation",
}


class RowError(Exception):
    """A row that isn't of the expected form.

    Attributes:
        field: The field that is wrong, such as `messages[2].role`.
        problem: What is wrong with it and what was expected.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


def text_of(row: Row, field: str, optional: bool = False, within: str = "") -> str:
    """Returns the string in a field of a row.

    Args:
        row: The row, or a mapping within it.
        field: The name of the field.
        optional: Returns "" if the field is missing or null.
        within: Which field of the row `row` is, for the error message; "" for the row itself.

    Raises:
        RowError: The field is missing or isn't a string.
    """
    value = row.get(field)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    place = f"{within}.{field}" if within else field
    if field not in row:
        there = ", ".join(row) or "nothing"
        raise RowError(place, f"is missing; {within or 'the row'} has {there}")
    raise RowError(place, f"expected a string, got {_shown(value)}")


def alpaca(row: Row, joined: bool) -> list[Message]:
    """Reads an alpaca row: instruction and output, optionally input, system, tools and history.

    Args:
        row: The row.
        joined: Puts a line break after the instruction even if there is no input, as ModelLink
            does.
    """
    instruction, extra = text_of(row, "instruction"), text_of(row, "input", optional=True)
    asked = f"{instruction}\n{extra}" if extra or joined else instruction
    messages = _system(text_of(row, "system", optional=True), _tools(row))
    for i, pair in enumerate(_list(row, "history") if row.get("history") else []):
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise RowError(f"history[{i}]", f"expected [question, answer], got {_shown(pair)}")
        turn = {"0": pair[0], "1": pair[1]}
        question, answer = (text_of(turn, name, within=f"history[{i}]") for name in turn)
        messages += [Message("user", question), Message("assistant", answer)]
    return [*messages, Message("user", asked), Message("assistant", text_of(row, "output"))]


def openai(row: Row) -> list[Message]:
    """Reads a row of OpenAI's or ChatGLM3's form: messages with role and content."""
    messages: list[Message] = []
    for i, turn in enumerate(_turns(row, "messages")):
        field = f"messages[{i}]"
        role = _role(turn.get("role"), _OPENAI_ROLES, f"{field}.role")
        calls = turn.get("tool_calls") or []
        content = text_of(turn, "content", optional=bool(calls), within=field)
        loss = turn.get("loss") is not False
        if content or not calls:
            metadata = text_of(turn, "metadata", optional=True, within=field)
            messages.append(Message(role, content, metadata, _parsed(turn, "tools"), loss))
        for j, call in enumerate(calls):
            function = call.get("function", call) if isinstance(call, Mapping) else call
            messages.append(_call(function, f"{field}.tool_calls[{j}]", loss))
    return _with_tools(messages, row)


def share_gpt(row: Row) -> list[Message]:
    """Reads a ShareGPT row: conversations with from and value, optionally system and tools."""
    messages = _system(text_of(row, "system", optional=True), None)
    for i, turn in enumerate(_turns(row, "conversations")):
        field = f"conversations[{i}]"
        if "from" not in turn and "role" in turn:  # ChatGLM3's own data has this column, too
            turn = {**turn, "from": turn["role"], "value": turn.get("content")}
        speaker = turn.get("from")
        role = _role(speaker, _SHARE_GPT_ROLES, f"{field}.from")
        value = text_of(turn, "value", within=field)
        loss = turn.get("loss") is not False
        if speaker == "function_call":
            messages.append(_call(_json(value, field), field, loss))
        else:
            metadata = text_of(turn, "metadata", optional=True, within=field)
            messages.append(Message(role, value, metadata, _parsed(turn, "tools"), loss))
    return _with_tools(messages, row)


def moss(row: Row) -> list[Message]:
    """Reads a MOSS row: chat.turn_N.Human and chat.turn_N.MOSS, without their marks."""
    chat = row.get("chat")
    if not isinstance(chat, Mapping):
        raise RowError("chat", f"expected turns with Human and MOSS, got {_shown(chat)}")
    messages: list[Message] = []
    for name, turn in chat.items():
        if not turn:
            continue
        if not isinstance(turn, Mapping):
            raise RowError(f"chat.{name}", f"expected Human and MOSS, got {_shown(turn)}")
        asked = (
            text_of(turn, "Human", within=f"chat.{name}")
            .replace("<eoh>", "")
            .replace("<|Human|>: ", "")
        )
        answer = (
            text_of(turn, "MOSS", within=f"chat.{name}")
            .replace("<|MOSS|>:", "")
            .replace("<eom>", "")
        )
        messages += [Message("user", asked.strip()), Message("assistant", answer.strip())]
    return messages


def belle(row: Row) -> list[Message]:
    """Reads a BELLE row, whose instruction holds the earlier turns as Human: and Assistant:."""
    messages: list[Message] = []
    for turn in text_of(row, "instruction").split("Human:"):
        if not turn:
            continue
        asked, *answer = turn.split("Assistant:")
        if answer:
            messages.append(Message("user", asked.strip()))
        messages.append(Message("assistant", (answer[0] if answer else asked).strip()))
    # The instruction ends with an empty Assistant: turn, which the output replaces.
    return [*messages[:-1], Message("assistant", text_of(row, "output").strip())]


def leetcode(row: Row) -> list[Message]:
    """Reads a LeetCode row: code_with_problem, code_only and explanation_only."""
    problem = text_of(row, "code_with_problem").split("```", maxsplit=1)[0]
    answer = f"{text_of(row, 'code_only')}\n{text_of(row, 'explanation_only')}"
    return [Message("user", problem.strip()), Message("assistant", answer)]


def alpaca_text(row: Row) -> str:
    """Returns an alpaca row as one text for pretraining.

    It is ModelLink's text, but for a row without input it doesn't have ModelLink's `None`.
    """
    extra = text_of(row, "input", optional=True)
    return (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
        "USER: Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n"
        f"### Instruction:\n{text_of(row, 'instruction')}\n\n"
        + (f"### Input:\n{extra}\n\n" if extra else "")
        + f"### Response: ASSISTANT: {text_of(row, 'output')}"
    )


def stack_overflow_text(row: Row) -> str:
    """Returns a row of title, question_body and answer_body as one text for pretraining."""
    return (
        f"In python, {text_of(row, 'title')}\n### Question:\n{text_of(row, 'question_body')}\n"
        f"### Response:\n{text_of(row, 'answer_body')}\n"
    )


def _call(function: Any, field: str, loss: bool) -> Message:
    """Returns the assistant turn of a tool call in OpenAI's form: name and arguments."""
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(field, f"expected a call with name and arguments, got {_shown(function)}")
    arguments = function.get("arguments", function.get("parameters")) or {}
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{field}.arguments")
    if not isinstance(arguments, Mapping):
        raise RowError(f"{field}.arguments", f"expected an object, got {_shown(arguments)}")
    return Message("assistant", call_text(arguments), function["name"], loss=loss)


def _with_tools(messages: list[Message], row: Row) -> list[Message]:
    """Puts the tools of a row into its system turn, which is added if there is none."""
    tools = _tools(row)
    if tools is None:
        return messages
    if messages and messages[0].role == "system":
        first, *messages = messages
        return [*_system(first.content, first.tools or tools), *messages]
    return [*_system("", tools), *messages]


def _system(content: str, tools: Any) -> list[Message]:
    """Returns the system turn for a content and tools, or no turn if there is neither."""
    turn = system_turn(content, tools)
    return [turn] if turn else []


def _tools(row: Row) -> Any:
    """Returns the tools of a row; None for an empty list, which stands for a plain chat."""
    return _parsed(row, "tools") or None


def _parsed(row: Row, field: str) -> Any:
    """Returns a JSON value, parsed if it is a string, as columnar formats have to write it."""
    value = row.get(field)
    if isinstance(value, str):
        return _json(value, field) if value.strip() else None
    return value


def _json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(field, f"expected JSON, got {_shown(text)}: {error.msg}") from None


def _list(row: Row, field: str) -> list[Any]:
    value = row.get(field)
    if isinstance(value, list):
        return value
    raise RowError(field, f"expected a list, got {_shown(value)}")


def _turns(row: Row, field: str) -> list[Row]:
    turns = _list(row, field)
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise RowError(f"{field}[{i}]", f"expected an object, got {_shown(turn)}")
    if not turns:
        raise RowError(field, "expected at least one turn, got []")
    return turns


def _role(name: Any, known: Mapping[str, Role], place: str) -> Role:
    if isinstance(name, str) and name in known:
        return known[name]
    raise RowError(place, f"expected one of {', '.join(known)}, got {_shown(name)}")


def _shown(value: Any) -> str:
    """Returns the type and the beginning of a value, for an error message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
