"""Turns rows of common data sets into texts and conversations.

There is one function for each form of row, and `handlers` chooses among them. No function here
deals with tokens.
"""

from collections.abc import Mapping

from glm3cli.data.preprocess.fields import Row, RowError, list_of, shown, text_of
from glm3cli.data.preprocess.turns import read_turns, tools_of
from glm3cli.data.tokens.messages import Message, system_turn


def alpaca(row: Row, joined: bool) -> list[Message]:
    """Reads an alpaca row: instruction and output, optionally input, system, tools and history.

    Args:
        row: The row.
        joined: Puts a line break after the instruction even if there is no input, as ModelLink
            does.
    """
    instruction, extra = text_of(row, "instruction"), text_of(row, "input", optional=True)
    asked = f"{instruction}\n{extra}" if extra or joined else instruction
    messages = _system(row)
    for i, pair in enumerate(list_of(row, "history") if row.get("history") else []):
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise RowError(f"history[{i}]", f"expected [question, answer], got {shown(pair)}")
        turn = {"0": pair[0], "1": pair[1]}
        question, answer = (text_of(turn, name, within=f"history[{i}]") for name in turn)
        messages += [Message("user", question), Message("assistant", answer)]
    return [*messages, Message("user", asked), Message("assistant", text_of(row, "output"))]


def pair(row: Row, asked: str, answered: str) -> list[Message]:
    """Reads a row with a question and an answer, each a text or a list of turns.

    Args:
        row: The row; with texts it may have system, tools and history, too.
        asked: The name of the question's column.
        answered: The name of the answer's column.
    """
    question, answer = row.get(asked), row.get(answered)
    if isinstance(question, list) and isinstance(answer, list):  # TRL's conversational form
        return openai({**row, "messages": [*question, *answer]})
    texts = {"instruction": text_of(row, asked), "output": text_of(row, answered)}
    return alpaca({**row, **texts, "input": None}, joined=False)


def openai(row: Row) -> list[Message]:
    """Reads a row of OpenAI's or ChatGLM3's form: messages, optionally system and tools."""
    return _conversation(row, "messages")


def share_gpt(row: Row) -> list[Message]:
    """Reads a row of ShareGPT's form: conversations, optionally system and tools."""
    return _conversation(row, "conversations")


def _conversation(row: Row, column: str) -> list[Message]:
    """Reads the turns of a row, with its system text and its tools in front of them.

    If the turns begin with a system turn, that has the tools.
    """
    messages, tools = read_turns(row, column), tools_of(row)
    if not messages or messages[0].role != "system":
        return [*_system(row), *messages]
    first, *others = messages
    turn = system_turn(first.content, first.tools or tools)
    named = text_of(row, "system", optional=True)
    before = [Message("system", named)] if named not in ("", first.content) else []
    return [*before, *([turn] if turn else []), *others]


def _system(row: Row) -> list[Message]:
    """Returns the system turn for the system text and the tools of a row; none without both."""
    turn = system_turn(text_of(row, "system", optional=True), tools_of(row))
    return [turn] if turn else []


def moss(row: Row) -> list[Message]:
    """Reads a MOSS row: chat.turn_N.Human and chat.turn_N.MOSS, without their marks."""
    chat = row.get("chat")
    if not isinstance(chat, Mapping):
        raise RowError("chat", f"expected turns with Human and MOSS, got {shown(chat)}")
    messages: list[Message] = []
    for name, turn in chat.items():
        if not turn:
            continue
        if not isinstance(turn, Mapping):
            raise RowError(f"chat.{name}", f"expected Human and MOSS, got {shown(turn)}")
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
