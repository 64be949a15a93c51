"""`Answer`: the answer to one request, as a stream or as a whole."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from glm3cli.infer.decoding.rules import Decoding
from glm3cli.infer.serve.orders import Begin, Order, Update
from glm3cli.infer.serve.protocol.asked import Asked, Reader
from glm3cli.infer.serve.protocol.bodies import SamplingBody
from glm3cli.infer.serve.protocol.choices import Choice, Piece
from glm3cli.version import __version__


@dataclass(frozen=True)
class Served:
    """A model that clients can name.

    Attributes:
        name: The name.
        adapter: The name of the engine's adapter that it is computed with; None for none.
    """

    name: str
    adapter: str | None = None


class Answer(ABC):
    """The choices of an answer, and the forms in which they are written.

    Attributes:
        makers: What makes the orders to the engine, one for each sequence.
    """

    _prefix = ""
    _object = _chunk = ""

    def __init__(self, reader: Reader, asked: Asked, body: SamplingBody, model: Served) -> None:
        """Begins an answer.

        Args:
            reader: What has read the request.
            asked: What the engine is asked.
            body: The request.
            model: The model.
        """
        self._tokenizer = reader.tokenizer
        self._asked = asked
        self._model = model
        self._id = f"{self._prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._has_usage = body.stream_options.include_usage
        self._choices = [
            Choice(self._tokenizer, decoding, asked)
            for decoding in asked.decodings
            for _ in range(asked.num_choices)
        ]
        self.makers: list[Callable[[int], Order]] = [
            partial(_begin, prompt.ids, decoding, asked.seed + index, model.adapter)
            for index, (prompt, decoding) in enumerate(
                (prompt, decoding)
                for prompt, decoding in zip(asked.prompts, asked.decodings, strict=True)
                for _ in range(asked.num_choices)
            )
            if decoding.max_new_tokens
        ]

    @property
    def num_prompt_tokens(self) -> int:
        """The number of tokens of all prompts."""
        return sum(len(prompt.ids) for prompt in self._asked.prompts)

    @property
    def num_new_tokens(self) -> int:
        """The number of tokens of all choices so far."""
        return sum(choice.num_tokens for choice in self._choices)

    def first(self) -> Iterator[tuple[int, Piece]]:
        """Yields what is known of choices, by their indices, before the engine has said anything.

        An empty piece stands for the beginning of a choice.
        """
        for index in range(len(self._choices)):
            yield index, Piece()

    def take(self, place: int, update: Update) -> Iterator[tuple[int, Piece]]:
        """Takes an update, and yields what it brings to choices, by their indices.

        Args:
            place: The place of the sequence among the orders.
            update: What there is new of it.

        Raises:
            ServerError: The sequence has ended by an error.
        """
        if piece := self._choices[place].take(update):
            yield place, piece

    def chunks(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yields the chunks of a stream that show a part of a choice."""
        for choice in self._deltas(index, piece):
            yield self._envelope(self._chunk, [choice]) | self._no_usage()

    def last_chunk(self) -> dict[str, Any] | None:
        """Returns the chunk with the numbers of tokens; None if the client hasn't asked for it."""
        if not self._has_usage:
            return None
        return self._envelope(self._chunk, []) | {"usage": self._usage()}

    def whole(self, pieces: dict[int, Piece]) -> dict[str, Any]:
        """Returns the whole answer.

        Args:
            pieces: All of each choice, by its index.
        """
        choices = [self._choice(index, pieces[index]) for index in sorted(pieces)]
        return self._envelope(self._object, choices) | {"usage": self._usage()}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns what stands around choices."""
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": f"glm3-{__version__}",
            "choices": choices,
        }

    def _no_usage(self) -> dict[str, Any]:
        """Returns what a chunk says of the numbers of tokens, which come last."""
        return {"usage": None} if self._has_usage else {}

    def _usage(self) -> dict[str, int]:
        """Returns the numbers of tokens."""
        prompt, new = self.num_prompt_tokens, self.num_new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    @abstractmethod
    def _deltas(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yields the choices of chunks that show a part of a choice."""

    @abstractmethod
    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns a whole choice."""


def _begin(
    prompt: list[int], decoding: Decoding, seed: int, adapter: str | None, number: int
) -> Begin:
    """Returns the order that continues a prompt."""
    return Begin(number, prompt, decoding, seed, adapter)
