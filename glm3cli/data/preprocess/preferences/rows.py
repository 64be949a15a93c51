"""Reads rows of preference data: pairs of answers, and single answers with a label.

The forms are those of TRL (dataset_formats in its documentation), of OpenAI's preference
fine-tuning, of LLaMA-Factory (data/README.md) and of ms-swift (Custom-dataset in its
documentation). No function here deals with tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from glm3cli.data.preprocess import rows
from glm3cli.data.preprocess.fields import Row, RowError, text_of
from glm3cli.data.tokens.messages import Message

# Columns of a prompt, in the order in which they are looked for.
_PROMPTS = ("prompt", "messages", "conversations", "instruction")
# The form of a row is shown by its columns: a file must have all of at least one set.
PAIR_FORMS = (
    *(frozenset({prompt, "chosen", "rejected"}) for prompt in _PROMPTS),
    frozenset({"chosen", "rejected"}),
    frozenset({"messages", "rejected_response"}),
    frozenset({"messages", "rejected_messages"}),
    frozenset({"input", "preferred_output", "non_preferred_output"}),
)
_LABELS = ("label", "kto_tag")
_ANSWERS = ("completion", "response", "answer", "output")
FEEDBACK_FORMS = (
    *(frozenset({"prompt", answer, label}) for answer in _ANSWERS for label in _LABELS),
    *(frozenset({"instruction", "output", label}) for label in _LABELS),
    *(frozenset({turns, label}) for turns in ("messages", "conversations") for label in _LABELS),
)
# Columns that any form may have beside its own.
OPTIONAL = frozenset({"input", "system", "history", "tools", "functions"})


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers.

    Attributes:
        prompt: The turns of the prompt, none of which is trained.
        chosen: The turns of the better answer.
        rejected: The turns of the worse answer.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True)
class Feedback:
    """A prompt with one answer and what was thought of it.

    Attributes:
        prompt: The turns of the prompt, none of which is trained.
        answer: The turns of the answer.
        is_liked: Whether the answer is one to learn, not one to avoid.
    """

    prompt: list[Message]
    answer: list[Message]
    is_liked: bool


def pair(row: Row) -> Pair:
    """Reads a prompt with a chosen and a rejected answer.

    Raises:
        RowError: The row has none of the forms.
    """
    if row.get("preferred_output") is not None:  # OpenAI's
        given = row.get("input")
        if not isinstance(given, Mapping):
            raise RowError("input", "expected an object with messages")
        chosen, rejected = _answer(row, "preferred_output"), _answer(row, "non_preferred_output")
        return _pair(_within(rows.openai, given, "input.messages"), chosen, rejected)
    for name in ("rejected_response", "rejected_messages"):  # ms-swift's
        if row.get(name) is not None:
            prompt, chosen = _split(rows.openai(row), "messages")
            return _pair(prompt, chosen, _last_of(_answer(row, name), name))
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if any(row.get(name) is not None for name in _PROMPTS):
        return _pair(_prompt(row), chosen, rejected)
    return _without_prompt(row, chosen, rejected)


def feedback(row: Row) -> Feedback:
    """Reads a prompt with one answer and its label.

    Raises:
        RowError: The row has none of the forms.
    """
    is_liked = _label(row)
    if row.get("prompt") is not None:
        name = next((name for name in _ANSWERS if row.get(name) is not None), _ANSWERS[0])
        prompt, answer = _prompt(row), _answer(row, name)
    elif row.get("messages") is not None:
        prompt, answer = _split(rows.openai(row), "messages")
    elif row.get("conversations") is not None:
        prompt, answer = _split(rows.share_gpt(row), "conversations")
    else:
        prompt, answer = _split(rows.alpaca(row, joined=False), "output")
    return Feedback(_untrained(prompt), answer, is_liked)


def _pair(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Pair:
    return Pair(_untrained(prompt), chosen, rejected)


def _untrained(prompt: list[Message]) -> list[Message]:
    """Returns the turns of a prompt as ones that aren't trained."""
    return [replace(message, loss=False) for message in prompt]


def _without_prompt(row: Row, chosen: list[Message], rejected: list[Message]) -> Pair:
    """Makes a pair of two whole conversations, whose common beginning is the prompt."""
    if isinstance(row.get("chosen"), str):
        expected = "or chosen and rejected as whole conversations"
        raise RowError("prompt", f"is missing; expected {', '.join(_PROMPTS)}, {expected}")
    shared = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        shared += 1
    if not shared:
        raise RowError("chosen", "expected a conversation that begins as rejected does")
    return _pair(chosen[:shared], chosen[shared:], rejected[shared:])


def _prompt(row: Row) -> list[Message]:
    """Reads the prompt of a row: a text or turns, with system text, history and tools."""
    name = next(name for name in _PROMPTS if row.get(name) is not None)
    value = row[name]
    if name == "conversations":
        return rows.share_gpt(row)
    if name == "messages" or isinstance(value, list):
        return _within(rows.openai, {**row, "messages": value}, name)
    asked = {key: row[key] for key in ("system", "history", "tools", "functions") if key in row}
    if name == "instruction":
        asked["input"] = row.get("input")
    asked |= {"instruction": text_of(row, name), "output": ""}
    return rows.alpaca(asked, joined=False)[:-1]


def _answer(row: Row, name: str) -> list[Message]:
    """Reads an answer: a text, a turn, or several turns, of OpenAI's or ShareGPT's form."""
    value = row.get(name)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return [Message("assistant", text_of(row, name))]
    is_share_gpt = any(isinstance(turn, Mapping) and "from" in turn for turn in value)
    read, column = (rows.share_gpt, "conversations") if is_share_gpt else (rows.openai, "messages")
    messages = _within(read, {column: value}, name)
    if messages[-1].role != "assistant":
        raise RowError(name, f"expected an assistant's turn at the end, got {messages[-1].role}")
    return messages


def _within(read: Any, row: Row, place: str) -> list[Message]:
    """Calls a function of `rows` on turns that stand in the field `place`, which errors name."""
    try:
        found: list[Message] = read(row)
    except RowError as error:
        field = error.field
        for column in ("messages", "conversations"):
            field = field.replace(column, place, 1) if field.startswith(column) else field
        raise RowError(field, error.problem) from None
    return found


def _split(messages: list[Message], place: str) -> tuple[list[Message], list[Message]]:
    """Cuts a conversation into its prompt and its answer, the assistant's turns at its end.

    Raises:
        RowError: It doesn't end with a turn of the assistant, or has no other turn.
    """
    start = len(messages)
    while start and messages[start - 1].role == "assistant":
        start -= 1
    if not 0 < start < len(messages):
        raise RowError(place, "expected a conversation that ends with an assistant's turn")
    return messages[:start], messages[start:]


def _last_of(messages: list[Message], place: str) -> list[Message]:
    """Returns the answer at the end of turns that may be a whole conversation."""
    if all(message.role == "assistant" for message in messages):
        return messages
    return _split(messages, place)[1]


def _label(row: Row) -> bool:
    """Reads whether an answer was liked: true or false, 1 or 0."""
    name = next((name for name in _LABELS if row.get(name) is not None), _LABELS[0])
    value = row.get(name)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise RowError(name, f"expected true or false, got {value!r}")
    return bool(value)
