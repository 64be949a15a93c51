r"""Turns conversations into token ids, for training and for generation.

In ChatGLM3's template a turn is its role token, the tokens of "METADATA\n", and the tokens of its
content (source: build_single_message and build_chat_input of ChatGLM3's tokenization_chatglm.py).
An assistant turn is ended by the role token of the next turn, so a model learns to stop only if
that token is trained, too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError

Role = Literal["system", "user", "assistant", "observation"]
Template = Literal["chatglm3", "modellink"]

ROLES: tuple[Role, ...] = get_args(Role)
# The label of a token that isn't trained (the default of torch's cross_entropy).
IGNORED_LABEL = -100

# The system message that ChatGLM3 was trained on in front of tools (source: its finetune_demo).
TOOL_PROMPT = (
    "Answer the following questions as best as you can. You have access to the following tools:"
)

# ModelLink 1.1's prompt (source: its prompter.py); the files made with it must be byte-identical.
_SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request. Please note that you "
    "need to think through your response logically and step by step."
)
_INSTRUCTION, _RESPONSE = "### Instruction:", "### Response:"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: What is said.
        metadata: The name of the tool that an assistant turn calls; "" for none.
        tools: The tools that a system turn offers to the model, as JSON values; None for none.
        loss: Whether an assistant turn is trained.
    """

    role: Role
    content: str
    metadata: str = ""
    tools: Any = None
    loss: bool = True

    @classmethod
    def from_dict(cls, turn: Mapping[str, Any]) -> "Message":
        """Reads a turn in ChatGLM3's own form: role, content, optional metadata, tools and loss.

        Raises:
            DataError: The role is unknown or the content isn't a string.
        """
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise DataError(f"role {role!r} is unknown", f"use {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"content of a {role} turn is {content!r}", "it must be a string")
        return cls(
            role,
            content,
            turn.get("metadata") or "",
            turn.get("tools"),
            turn.get("loss") is not False,
        )

    @property
    def text(self) -> str:
        """The content as the model reads it, which includes the tools of a system turn."""
        if self.role == "system" and self.tools is not None:
            return f"{self.content}\n{json.dumps(self.tools, indent=4, ensure_ascii=False)}"
        return self.content


@dataclass(frozen=True)
class Sample:
    """One training sequence.

    Attributes:
        input_ids: The token ids.
        labels: For each position, its own id if it is trained, else IGNORED_LABEL. The labels
            aren't shifted: the token before a position predicts its label.
    """

    input_ids: list[int]
    labels: list[int]


def system_turn(content: str, tools: Any) -> Message | None:
    """Returns the turn with which a conversation begins, for training and generation alike.

    Args:
        content: The system text; in front of tools, an empty one stands for `TOOL_PROMPT`.
        tools: The tools that the model may call, as JSON values; none if it is None or empty.

    Returns:
        The turn; None if there is neither a text nor a tool.
    """
    if not content and not tools:
        return None
    return Message("system", content or TOOL_PROMPT, tools=tools or None)


def build_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Returns the ids after which the model answers.

    They are the prefix, all turns, and the assistant's role token.
    """
    ids = list(tokenizer.prefix)
    for message in messages:
        ids += _turn(tokenizer, message)
    return [*ids, tokenizer.special("<|assistant|>")]


def begin_turn(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Returns the ids after which the model goes on with the last of the turns."""
    turns = [_turn(tokenizer, message) for message in messages]
    return [*tokenizer.prefix, *(token for turn in turns for token in turn)]


def build_sample(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: Template = "chatglm3",
    append_eod: bool = False,
) -> Sample:
    """Turns a conversation into ids and labels for training.

    Args:
        tokenizer: The tokenizer.
        messages: The turns.
        template: `chatglm3` trains every assistant turn with `loss`, and the token that ends it:
            the next turn's role token, or the end token after the last turn. `modellink` writes
            ModelLink 1.1's prompt and trains the last answer only.
        append_eod: Appends the end token in the template `modellink`; `chatglm3` always does.
    """
    if template == "modellink":
        return _modellink_sample(tokenizer, messages, append_eod)
    ids, labels = list(tokenizer.prefix), [IGNORED_LABEL] * len(tokenizer.prefix)
    trained = False
    for message in messages:
        turn = _turn(tokenizer, message)
        labels.append(turn[0] if trained else IGNORED_LABEL)
        trained = message.role == "assistant" and message.loss
        labels += turn[1:] if trained else [IGNORED_LABEL] * (len(turn) - 1)
        ids += turn
    labels.append(tokenizer.eos_id if trained else IGNORED_LABEL)
    return Sample([*ids, tokenizer.eos_id], labels)


def truncate(tokenizer: Tokenizer, sample: Sample, length: int) -> Sample | None:
    """Cuts a sample to at most `length` tokens so that it still ends with a trained token.

    A cut within an answer keeps the answer's beginning, followed by the token that ended it. A cut
    within a prompt is moved back to the end of the answer before it.

    Args:
        tokenizer: The tokenizer that made the sample.
        sample: The sample.
        length: The largest number of tokens.

    Returns:
        The cut sample, the same object if it is short enough, or None if no trained token is left.
    """
    ids, labels = sample.input_ids, sample.labels
    if len(ids) <= length:
        return sample
    cut = length - 1
    if labels[cut] == IGNORED_LABEL:
        while cut >= 0 and labels[cut] == IGNORED_LABEL:
            cut -= 1
        return Sample(ids[: cut + 1], labels[: cut + 1]) if cut >= 0 else None
    end = cut
    while not tokenizer.is_special(ids[end]) and labels[end + 1 : end + 2] not in (
        [],
        [IGNORED_LABEL],
    ):
        end += 1
    kept = labels[:cut]
    return Sample([*ids[:cut], ids[end]], [*kept, labels[end]])


def call_text(arguments: Mapping[str, Any]) -> str:
    """Returns the content of a turn that calls a tool; the tool's name is the turn's metadata."""
    listed = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"```python\ntool_call({listed})\n```"


def parse_reply(text: str) -> Message:
    """Splits generated text at its first line break into metadata and content of an answer."""
    metadata, found, content = text.partition("\n")
    if not found or not metadata.strip():
        return Message("assistant", text.strip())
    return Message("assistant", content, metadata.strip())


def _turn(tokenizer: Tokenizer, message: Message) -> list[int]:
    """Returns the ids of a turn in ChatGLM3's template."""
    return [
        tokenizer.special(f"<|{message.role}|>"),
        *tokenizer.encode(f"{message.metadata}\n"),
        *tokenizer.encode(message.text),
    ]


def _modellink_sample(
    tokenizer: Tokenizer, messages: Sequence[Message], append_eod: bool
) -> Sample:
    """Builds a sample in ModelLink's template; every turn but the assistant's is an instruction."""
    text = f"\n{_SYSTEM}\n" + "".join(
        f"{_RESPONSE if message.role == 'assistant' else _INSTRUCTION}\n{message.content}\n"
        for message in messages
    )
    # The last marker of the whole text, as in ModelLink: a marker within the answer, too, makes
    # everything before it untrained.
    prompt = f"{text.rsplit(_RESPONSE, maxsplit=1)[0]}{_RESPONSE}\n"
    ids = [*tokenizer.prefix, *tokenizer.encode(text)]
    if append_eod:
        ids.append(tokenizer.eos_id)
    num_hidden = min(len(ids), len(tokenizer.prefix) + len(tokenizer.encode(prompt)))
    return Sample(ids, [IGNORED_LABEL] * num_hidden + ids[num_hidden:])
