"""Reads prompts and answers, and takes prompts off answers that are whole conversations.

No function here deals with tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from glm3cli.data.preprocess import rows
from glm3cli.data.preprocess.fields import Row, RowError, first_of, shown, text_of
from glm3cli.data.tokens.messages import Message

# Columns of a prompt, in the order in which they are looked for.
PROMPTS = (
    "prompt",
    "messages",
    "conversations",
    "conversation",
    "instruction",
    "question",
    "query",
)


def prompt_of(row: Row) -> list[Message]:
    """Reads the prompt of a row: a text or turns, with system text, history and tools.

    Raises:
        RowError: The row has no prompt, or one of another form.
    """
    name = first_of(row, PROMPTS)
    if name is None:
        raise RowError("prompt", f"is missing; expected {', '.join(PROMPTS)}")
    if name == "conversations":
        return rows.share_gpt(row)
    if name == "conversation":
        return rows.conversation(row)
    if name == "messages" or isinstance(row[name], list):
        return _within(rows.openai, {**row, "messages": row[name]}, name)
    asked = {**row, "instruction": text_of(row, name), "output": ""}
    return rows.alpaca(asked, joined=False)[:-1]


def answer_of(row: Row, name: str, within: Row | None = None) -> list[Message]:
    """Reads an answer: a text, a turn, or several turns, of OpenAI's or ShareGPT's form.

    Args:
        row: The row.
        name: The column of the answer.
        within: Has the system text and the tools of the answer if it is a whole conversation.

    Raises:
        RowError: The answer has none of the forms, or doesn't end with the assistant.
    """
    value = row.get(name)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return [Message("assistant", text_of(row, name))]
    is_share_gpt = any(isinstance(turn, Mapping) and "from" in turn for turn in value)
    read, column = (rows.share_gpt, "conversations") if is_share_gpt else (rows.openai, "messages")
    messages = _within(read, {**(within or {}), column: value}, name)
    if messages[-1].role != "assistant":
        raise RowError(name, f"expected an assistant's turn at the end, got {messages[-1].role}")
    return messages


def openai_prompt(given: Row, place: str) -> list[Message]:
    """Reads the messages of an object in the field `place`, as OpenAI's preference sets have them.

    Raises:
        RowError: They have none of the forms.
    """
    return _within(rows.openai, given, f"{place}.messages")


def is_whole(answer: list[Message]) -> bool:
    """Returns whether an answer is a whole conversation: it has turns before the assistant's."""
    return answer[0].role in ("system", "user")


def after_prompt(
    prompt: list[Message], answers: dict[str, list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """Takes the prompt off the answers that are whole conversations.

    Args:
        prompt: The prompt.
        answers: The answers by their columns.

    Returns:
        The prompt, with the system turn that the answers have if it has none itself, and the
        answers without it.

    Raises:
        RowError: An answer begins with turns that aren't the prompt's, or the prompt ends with an
            answer already.
    """
    systems, rests = [_system(prompt)], []
    for name, answer in answers.items():
        size = _size_of_prompt(prompt, answer, name) if is_whole(answer) else 0
        systems.append(_system(answer[:size]))
        rests.append(answer[size:])
        if prompt[-1].role == "assistant" and rests[-1][0].role != "observation":
            problem = f"answers a prompt that ends with an answer, {shown(prompt[-1].content)}"
            raise RowError(name, f"{problem}: end the prompt with a question")
    told = [system for system in systems if system]
    texts = [[message.content for message in system] for system in told]
    if any(text != texts[0] for text in texts[1:]):
        raise RowError(", ".join(answers), "expected the system text of the prompt")
    return [*(told[0] if told else []), *_others(prompt)], rests


def common_beginning(one: list[Message], other: list[Message]) -> int:
    """Returns the number of turns with which two conversations begin, each without its last."""
    size = 0
    for first, second in zip(untrained(one[:-1]), untrained(other[:-1]), strict=False):
        if first != second:
            break
        size += 1
    return size


def untrained(prompt: list[Message]) -> list[Message]:
    """Returns the turns of a prompt as ones that aren't trained."""
    return [replace(message, loss=False) for message in prompt]


def split(messages: list[Message], place: str) -> tuple[list[Message], list[Message]]:
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


def _size_of_prompt(prompt: list[Message], answer: list[Message], name: str) -> int:
    """Returns the number of turns of the prompt at the start of an answer.

    Raises:
        RowError: The answer begins otherwise, or has nothing behind the prompt.
    """
    asked, said = (untrained(_others(turns)) for turns in (prompt, answer))
    size = len(answer) - len(said) + len(asked)
    if list(map(_bare, said[: len(asked)])) != list(map(_bare, asked)) or size >= len(answer):
        raise RowError(name, "expected an answer, or a conversation that begins with the prompt")
    return size


def _bare(message: Message) -> Message:
    """Returns a turn without the white space around its text."""
    return replace(message, content=message.content.strip())


def _system(messages: list[Message]) -> list[Message]:
    """Returns the system turns at the start of a conversation."""
    return messages[: len(messages) - len(_others(messages))]


def _others(messages: list[Message]) -> list[Message]:
    """Returns the turns behind the system turns at the start of a conversation."""
    start = 0
    while start < len(messages) and messages[start].role == "system":
        start += 1
    return messages[start:]


def _within(read: Callable[[Row], list[Message]], row: Row, place: str) -> list[Message]:
    """Calls a function of `rows` on turns that stand in the field `place`, which errors name."""
    try:
        return read(row)
    except RowError as error:
        field = error.field
        for column in ("messages", "conversations"):
            field = field.replace(column, place, 1) if field.startswith(column) else field
        raise RowError(field, error.problem) from None
