"""`ChatFormat`: what every way of writing a conversation can do."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

from glm3cli.data.tokens.messages import IGNORED_LABEL, Message, Sample, ToolCall
from glm3cli.errors import DataError


class Speller(Protocol):
    """What a format asks of a tokenizer."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids with which every sequence starts."""

    @property
    def eos_id(self) -> int:
        """The id of the end token."""

    def special(self, name: str) -> int:
        """Returns the id of a special token."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""


class ChatFormat(ABC):
    """A way of writing a conversation.

    Attributes:
        separator: The special token with which an answer begins another turn; None if no answer
            does.
        trains_all: Whether all answers of a conversation can be trained in one sample; if not, each
            has a sample of its own, in which it comes last.
        calls: The language in which calls of tools are written; None if the model knows no calls.
        template: The Jinja template by which transformers writes the same; "" if there is none.
    """

    separator: ClassVar[str | None] = None
    trains_all: ClassVar[bool] = True
    calls: ClassVar[Literal["python", "json"] | None] = None
    template: str = ""

    @abstractmethod
    def prompt(self, tokenizer: Speller, messages: Sequence[Message]) -> list[int]:
        """Returns the ids after which the model answers.

        Raises:
            DataError: The format can't write the conversation.
        """

    @abstractmethod
    def begun(self, tokenizer: Speller, messages: Sequence[Message]) -> list[int]:
        """Returns the ids after which the model goes on with the last of the turns, an answer.

        Raises:
            DataError: The format can't write the conversation.
        """

    def text_start(self, tokenizer: Speller) -> list[int]:
        """Returns what an answer that is no call begins with after its prompt."""
        return []

    @abstractmethod
    def sample(self, tokenizer: Speller, messages: Sequence[Message]) -> Sample:
        """Returns a conversation for training, with the token that ends it.

        Every answer with `loss` is trained, together with the token that ends it; where
        `trains_all` is false, the last one.

        Raises:
            DataError: The format can't write the conversation.
        """

    def text(self, message: Message) -> str:
        """Returns what the model reads of a turn."""
        if message.arguments is not None and not message.content:
            return self.call_text(message.arguments)
        return message.content

    def call_text(self, arguments: Mapping[str, Any]) -> str:
        """Returns the content of a turn that calls a tool.

        Raises:
            DataError: The format has no calls.
        """
        raise DataError(
            "a turn calls a tool, which this model's format has no form for",
            "leave such conversations out, or use a model with tools, such as ChatGLM3",
        )

    def read_calls(self, message: Message) -> list[ToolCall]:
        """Returns the calls that an assistant turn consists of; none if it is text."""
        return []

    def may_be_call(self, text: str) -> bool:
        """Returns whether an answer that begins with a text can still become a call."""
        return False

    def parse(self, text: str) -> Message:
        """Returns the turn that a generated text is."""
        return Message("assistant", text.strip())


def answered(prompt: list[int], answer: list[int], end: int) -> Sample:
    """Returns the sample in which a prompt is answered, and the answer and its end are trained."""
    labels = [IGNORED_LABEL] * len(prompt) + [*answer, end]
    return Sample([*prompt, *answer, end], labels)


def parse_reply(text: str) -> Message:
    """Splits generated text at its first line break into metadata and content of an answer."""
    metadata, found, content = text.partition("\n")
    if not found or not metadata.strip():
        return Message("assistant", text.strip())
    return Message("assistant", content, metadata.strip())
