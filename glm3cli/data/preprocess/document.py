"""`Document`: the token ids that a handler makes of one row, and how conversations get there."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from glm3cli.data.preprocess.fields import RowError
from glm3cli.data.tokens.chat import Template, build_sample
from glm3cli.data.tokens.messages import Message, Sample
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError

Ids = list[int] | np.ndarray


@dataclass
class Document:
    """The token ids of one row.

    Attributes:
        sequences: The sequences of token ids by output key; a key that is missing gets no
            document.
        text_bytes: The size of the encoded text, in bytes of UTF-8.
        num_dropped: The number of samples that were left out because --seq-length left no answer,
            or because their weight is 0.
        num_truncated: The number of samples that --seq-length cut.
        num_equal: The number of pairs that were left out because their answers are the same.
    """

    sequences: dict[str, list[Ids]] = field(default_factory=dict)
    text_bytes: int = 0
    num_dropped: int = 0
    num_truncated: int = 0
    num_equal: int = 0


def written_sample(
    tokenizer: Tokenizer, messages: Sequence[Message], template: Template, append_eod: bool
) -> Sample:
    """Returns what `build_sample` makes of a conversation in a row.

    Raises:
        RowError: The model's chat format can't write the conversation.
    """
    try:
        return build_sample(tokenizer, messages, template, append_eod)
    except DataError as error:
        raise RowError("row", f"{error.message}; {error.hint}") from None


def written_size(tokenizer: Tokenizer, messages: Iterable[Message]) -> int:
    """Returns the size of the texts of turns as the model reads them, in bytes of UTF-8."""
    return sum(utf8_size(tokenizer.chat.text(message)) for message in messages)


def utf8_size(text: str) -> int:
    """Returns the size of a text in bytes of UTF-8; half a surrogate pair counts as one byte."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
