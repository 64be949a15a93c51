"""`Choice`: one answer to a request, as it comes."""

from collections.abc import Callable
from dataclasses import dataclass, field

from glm3cli.data.tokens.calls import ReplyStream
from glm3cli.data.tokens.messages import ToolCall
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.infer.decoding.grammar import GrammarStream
from glm3cli.infer.decoding.rules import Decoding
from glm3cli.infer.decoding.stops import Decoder, StopStream
from glm3cli.infer.serve.orders import Token, Update
from glm3cli.infer.serve.protocol.asked import Asked
from glm3cli.infer.serve.protocol.errors import ServerError

# OpenAI's words for how an answer has ended, by ours.
_FINISHES = {"stop": "stop", "stop_text": "stop", "length": "length"}


@dataclass(frozen=True)
class Piece:
    """A part of an answer, or all of it.

    Attributes:
        text: The text.
        calls: The tool calls.
        tokens: The tokens, if their log-probabilities are wanted.
        finish: Why the answer has ended, in OpenAI's word; None if it goes on.
    """

    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.text or self.calls or self.tokens or self.finish)

    def __add__(self, other: "Piece") -> "Piece":
        """Returns this part with the next one."""
        return Piece(
            self.text + other.text,
            self.calls + other.calls,
            self.tokens + other.tokens,
            other.finish or self.finish,
        )


class Choice:
    """Makes pieces of the updates of one sequence.

    Attributes:
        num_tokens: The number of tokens so far.
    """

    def __init__(self, tokenizer: Tokenizer, decoding: Decoding, asked: Asked) -> None:
        """Begins an answer.

        Args:
            tokenizer: The tokenizer.
            decoding: How the answer is made.
            asked: The request.
        """
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._stops = decoding.stops
        self._wants_tokens = decoding.logprobs is not None
        self._held: list[Token] = []
        self._num_calls = 0
        self._most_calls = 1 if asked.is_single else None

        def begin() -> StopStream:
            decoder: Decoder = tokenizer.stream_decoder(goes_on=asked.goes_on)
            if decoding.grammar:
                decoder = GrammarStream(tokenizer)
            return StopStream(tokenizer, decoding.stops, decoder)

        self._begin: Callable[[], StopStream] = begin
        self._reply = None if asked.is_plain else ReplyStream(tokenizer, asked.tools, begin)
        self._text: Decoder = self._reply or begin()

    def take(self, update: Update) -> Piece:
        """Takes an update of the sequence, and returns what it brings.

        Raises:
            ServerError: The answer has ended by an error.
        """
        if update.problem:
            raise ServerError(update.problem)
        self.num_tokens += len(update.tokens)
        text = "".join([self._text.push(token.id) for token in update.tokens])
        if self._wants_tokens:
            self._held += update.tokens
        finish = None
        if update.finish is not None:
            text += self._text.finish()
            finish = _FINISHES[update.finish]
        calls = self._new_calls()
        if finish is not None and self._num_calls:
            finish = "tool_calls"
        return Piece(text, calls, self._certain(is_last=finish is not None), finish)

    def _new_calls(self) -> list[ToolCall]:
        """Returns the calls that have become complete."""
        if self._reply is None:
            return []
        new = self._reply.calls[self._num_calls : self._most_calls]
        self._num_calls += len(new)
        return new

    def _certain(self, *, is_last: bool) -> list[Token]:
        """Returns the tokens that stay, whatever comes: with stop texts, they are known last."""
        if self._stops and not is_last:
            return []
        tokens, self._held = self._held, []
        return self._before_stop(tokens) if self._stops else tokens

    def _before_stop(self, tokens: list[Token]) -> list[Token]:
        """Returns the tokens of an answer that begin before a stop text."""
        stream, decoder = self._begin(), self._tokenizer.stream_decoder(goes_on=True)
        length = len("".join([stream.push(token.id) for token in tokens]) + stream.finish())
        count, start = 0, 0
        for token in tokens:
            if start >= length > 0 and self._tokenizer.piece(token.id):
                break
            start += len(decoder.push(token.id))
            count += 1
        return tokens[:count] if length else []
