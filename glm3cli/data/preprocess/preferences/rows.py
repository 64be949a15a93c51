"""Reads rows of preference data: pairs of answers, and single answers with a label.

The forms are those of TRL (dataset_formats in its documentation), of OpenAI's preference
fine-tuning, of LLaMA-Factory (data/README.md) and of ms-swift (Custom-dataset in its
documentation). No function here deals with tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from glm3cli.data.preprocess import rows
from glm3cli.data.preprocess.fields import Row, RowError, first_of, shown, truth_of
from glm3cli.data.preprocess.preferences.answers import (
    PROMPTS,
    after_prompt,
    answer_of,
    common_beginning,
    is_whole,
    openai_prompt,
    prompt_of,
    split,
    untrained,
)
from glm3cli.data.preprocess.unread import CONTEXT, MEDIA
from glm3cli.data.tokens.messages import Message

# The form of a row is shown by its columns: a file must have all of at least one set.
PAIR_FORMS = (
    *(frozenset({prompt, "chosen", "rejected"}) for prompt in PROMPTS),
    frozenset({"chosen", "rejected"}),
    frozenset({"messages", "rejected_response"}),
    frozenset({"messages", "rejected_messages"}),
    frozenset({"input", "preferred_output", "non_preferred_output"}),
)
_LABELS = ("label", "kto_tag")
_ANSWERS = ("completion", "response", "answer", "output")
# A question and its answer; a row has any of the answers beside any of the questions.
_ASKED = ("prompt", "question", "query")
_PAIRS = (
    *(("prompt", answer) for answer in _ANSWERS),
    ("question", "answer"),
    ("query", "response"),
)
_TURNS = {
    "messages": rows.openai,
    "conversations": rows.share_gpt,
    "conversation": rows.conversation,
}
FEEDBACK_FORMS = tuple(
    frozenset({*columns, label})
    for columns in (*_PAIRS, ("instruction", "output"), *((turns,) for turns in _TURNS))
    for label in _LABELS
)
# Columns that any form may have beside its own.
OPTIONAL = frozenset({"input", *rows.SYSTEM, "history", "tools", "functions", CONTEXT, *MEDIA})


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
        return _pair(row, openai_prompt(given, "input"), "preferred_output", "non_preferred_output")
    if other := first_of(row, ("rejected_response", "rejected_messages")):  # ms-swift's
        rejected = answer_of(row, other)
        if is_whole(rejected):
            return _without_prompt(rows.openai(row), answer_of(row, other, row), other)
        prompt, chosen = split(rows.openai(row), "messages")
        return Pair(untrained(prompt), chosen, rejected)
    prompt = prompt_of(row) if first_of(row, PROMPTS) else []
    if not prompt and isinstance(row.get("chosen"), str):
        expected = "or chosen and rejected as whole conversations"
        raise RowError("prompt", f"is missing; expected {', '.join(PROMPTS)}, {expected}")
    chosen = answer_of(row, "chosen", row)
    if not prompt or untrained(prompt) == untrained(chosen):  # then a prompt with the answer
        return _without_prompt(chosen, answer_of(row, "rejected", row), "rejected")
    return _pair(row, prompt, "chosen", "rejected")


def feedback(row: Row) -> Feedback:
    """Reads a prompt with one answer and its label.

    Raises:
        RowError: The row has none of the forms.
    """
    is_liked = _label(row)
    column = first_of(row, PROMPTS)
    if column in _ASKED:
        name = first_of(row, _ANSWERS) or _ANSWERS[0]
        prompt, [answer] = after_prompt(prompt_of(row), {name: answer_of(row, name)})
    elif column in _TURNS:
        prompt, answer = split(_TURNS[column](row), column)
    else:
        prompt, answer = split(rows.alpaca(row, joined=False), "output")
    return Feedback(untrained(prompt), answer, is_liked)


def _pair(row: Row, prompt: list[Message], chosen: str, rejected: str) -> Pair:
    """Makes a pair of a prompt and the answers in two columns of a row."""
    answers = {name: answer_of(row, name) for name in (chosen, rejected)}
    prompt, (better, worse) = after_prompt(prompt, answers)
    return Pair(untrained(prompt), better, worse)


def _without_prompt(chosen: list[Message], rejected: list[Message], name: str) -> Pair:
    """Makes a pair of two whole conversations, whose common beginning is the prompt.

    Raises:
        RowError: They have none; the error names the column of the rejected one.
    """
    size = common_beginning(chosen, rejected)
    if all(message.role == "system" for message in chosen[:size]):
        raise RowError(name, "expected a conversation that begins as the better one does")
    return Pair(untrained(chosen[:size]), chosen[size:], rejected[size:])


def _label(row: Row) -> bool:
    """Reads whether an answer was liked: true or false, 1 or 0, or one of them as a text."""
    name = first_of(row, _LABELS) or _LABELS[0]
    is_liked = truth_of(row.get(name))
    if is_liked is None:
        raise RowError(name, f"expected true or false, or 1 or 0, got {shown(row.get(name))}")
    return is_liked
