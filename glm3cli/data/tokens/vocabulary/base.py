"""`Vocabulary`: turns text into the ids of tokens and back, without special tokens."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from glm3cli.config.family.members import VocabularyKind


class ByteDecoder(Protocol):
    """Turns bytes that come piece by piece into text."""

    def push(self, data: bytes) -> str:
        """Takes bytes, and returns the text that has become certain with them."""

    def finish(self) -> str:
        """Returns the text of the bytes held back, which are no whole character."""


class Vocabulary(ABC):
    """The tokens of text.

    Attributes:
        kind: The kind of the file.
        path: The file.
        size: The number of tokens; their ids begin with 0.
        hidden_spaces: How many leading spaces decoding leaves out because encoding puts them in:
            0 for none, 1 for one, 2 for any number.
        end: The id of the end token, if the file itself has it.
        filler: The id that fills up short samples, if the file itself has it.
    """

    kind: ClassVar[VocabularyKind]
    path: Path
    size: int
    hidden_spaces: int = 0
    end: int | None = None
    filler: int | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, in which special tokens are text as any other."""

    def encode_array(self, text: str) -> np.ndarray:
        """Returns the ids of a text as int32 [number of tokens]."""
        return np.array(self.encode(text), dtype=np.int32)

    def encode_as_it_is(self, text: str) -> list[int]:
        """Returns the ids of a text in front of which no space is put."""
        return self.encode(text)

    @abstractmethod
    def is_text(self, token: int) -> bool:
        """Returns whether an id stands for text."""

    @abstractmethod
    def piece(self, token: int) -> str | bytes:
        """Returns what an id stands for: text, or bytes that needn't be whole characters."""

    @abstractmethod
    def name(self, token: int) -> str:
        """Returns how the file spells an id, to be shown to people."""

    @abstractmethod
    def byte_decoder(self) -> ByteDecoder:
        """Returns what makes text of the bytes of tokens."""

    def speed_up(self) -> None:  # noqa: B027 - a kind that is fast has nothing to do
        """Makes encoding several times as fast, at the cost of a second now and some memory."""
