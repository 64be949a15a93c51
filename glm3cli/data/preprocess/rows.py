"""Turns rows of common data sets into texts and conversations.

There is one function for each form of row, and `handlers` chooses among them. No function here
deals with tokens.
"""

from collections.abc import Mapping

from glm3cli.data.preprocess.fields import Row, RowError, list_of, only_one, shown, text_of
from glm3cli.data.preprocess.turns import read_turns, tools_of
from glm3cli.data.preprocess.unread import check_no_context, check_no_media
from glm3cli.data.tokens.messages import Message, system_turn

# The columns of a row's system text.
SYSTEM = ("system", "system_prompt")


def alpaca(row: Row, joined: bool) -> list[Message]:
    """Reads an alpaca row: instruction and output, optionally input, system, tools and history.

    Args:
        row: The row.
        joined: Puts a line break after the instruction even if there is no input, as ModelLink
            does.

    Raises:
        RowError: The row has another form, or pictures or a context, which aren't read.
    """
    check_no_media(row)
    check_no_context(row)
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
        row: The row; with texts it may have input, system, tools and history, too.
        asked: The name of the question's column.
        answered: The name of the answer's column.
    """
    question, answer = row.get(asked), row.get(answered)
    if isinstance(question, list) and isinstance(answer, list):  # TRL's conversational form
        return openai({**row, "messages": [*question, *answer]})
    texts = {"instruction": text_of(row, asked), "output": text_of(row, answered)}
    return alpaca({**row, **texts}, joined=False)


def openai(row: Row) -> list[Message]:
    """Reads a row of OpenAI's or ChatGLM3's form: messages, optionally system and tools."""
    return _conversation(row, "messages")


def share_gpt(row: Row) -> list[Message]:
    """Reads a row of ShareGPT's form: conversations, optionally system and tools."""
    return _conversation(row, "conversations")


def conversation(row: Row) -> list[Message]:
    """Reads a row with a conversation, optionally system and tools.

    Its turns are OpenAI's, as in WildChat and LMSYS-Chat-1M, or pairs of human and assistant, as
    ms-swift has them.
    """
    pairs = list_of(row, "conversation")
    if not any(isinstance(pair, Mapping) and "human" in pair for pair in pairs):
        return _conversation(row, "conversation")
    check_no_media(row)
    messages = _system(row)
    for i, pair in enumerate(pairs):
        place = f"conversation[{i}]"
        if not isinstance(pair, Mapping):
            raise RowError(place, f"expected human and assistant, got {shown(pair)}")
        check_no_media(pair, place)
        messages.append(Message("user", text_of(pair, "human", within=place)))
        messages.append(Message("assistant", text_of(pair, "assistant", within=place)))
    return messages


def _conversation(row: Row, column: str) -> list[Message]:
    """Reads the turns of a row, with its system text and its tools in front of them.

    If the turns begin with a system turn, that has the tools.
    """
    check_no_media(row)
    messages, tools = read_turns(row, column), tools_of(row)
    if not messages or messages[0].role != "system":
        return [*_system(row), *messages]
    first, *others = messages
    if tools and first.tools and tools != first.tools:
        raise RowError("tools", "differ from those of the system turn; give one of them")
    turn = system_turn(first.content, first.tools or tools)
    named = system_text(row)
    before = [Message("system", named)] if named not in ("", first.content) else []
    return [*before, *([turn] if turn else []), *others]


def system_text(row: Row) -> str:
    """Returns the system text in a column of a row; "" without one.

    Raises:
        RowError: It is no text, or two columns differ.
    """
    there = {name: row.get(name) or None for name in SYSTEM}
    return text_of(row, only_one(there, SYSTEM, "row") or SYSTEM[0], optional=True)


def _system(row: Row) -> list[Message]:
    """Returns the system turn for the system text and the tools of a row; none without both."""
    turn = system_turn(system_text(row), tools_of(row))
    return [turn] if turn else []


def moss(row: Row) -> list[Message]:
    """Reads a MOSS row: chat.turn_N.Human and chat.turn_N.MOSS, without their marks."""
    check_no_media(row)
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
    """Reads a BELLE row, whose instruction holds the earlier turns as Human: and Assistant:.

    The output answers its last question, behind which an empty Assistant: may stand. An instruction
    that names no speaker is the question.

    Raises:
        RowError: The row has another form, or its last question has an answer beside the output.
    """
    check_no_media(row)
    before, *turns = text_of(row, "instruction").split("Human:")
    if not turns:
        before, turns = "", [before]
    messages = [Message("system", before.strip())] if before.strip() else []
    for turn in turns:
        asked, answered, answer = turn.partition("Assistant:")
        messages.append(Message("user", asked.strip()))
        if answered:
            messages.append(Message("assistant", answer.strip()))
    *earlier, last = messages
    if last.role == "assistant":
        if last.content:
            expected = "expected a question at its end, or an empty Assistant:"
            raise RowError("instruction", f"{expected}; got the answer {shown(last.content)}")
        *earlier, last = earlier
    extra = text_of(row, "input", optional=True).strip()
    asked = f"{last.content}\n{extra}" if extra else last.content
    answer = text_of(row, "output").strip()
    return [*earlier, Message("user", asked), Message("assistant", answer)]


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
