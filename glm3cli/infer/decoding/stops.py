"""Ends texts where a given string comes, wherever tokens begin and end."""

from collections.abc import Sequence
from typing import Protocol

from glm3cli.data.tokens.tokenizer import Tokenizer


def cut_at(stops: Sequence[str], text: str) -> str:
    """Returns a text up to the first of the strings."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


class StopTexts:
    """Strings with which a continuation ends."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        """Takes the strings; empty ones are ignored."""
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._longest = max((len(stop.encode()) for stop in self._stops), default=0)

    def is_end(self, tokens: Sequence[int]) -> bool:
        """Returns whether a string has just become complete; asked after each new token.

        Args:
            tokens: The ids of all new tokens so far.
        """
        if not self._stops:
            return False
        # Before the last token, as many as hold the longest string; its first character may be cut.
        first, size = len(tokens) - 1, 0
        while first > 0 and size < self._longest:
            first -= 1
            piece = self._tokenizer.piece(tokens[first])
            size += len(piece if isinstance(piece, bytes) else piece.encode())
        text = self._tokenizer.decode(tokens[max(first, 0) :])
        return any(stop in text for stop in self._stops)

    def cut(self, text: str) -> str:
        """Returns the text before the first of the strings."""
        return cut_at(self._stops, text)


class Decoder(Protocol):
    """What turns tokens into text one by one, such as a tokenizer's stream decoder."""

    def push(self, token: int) -> str:
        """Takes one token, and returns the text that has become certain with it."""
        ...

    def finish(self) -> str:
        """Returns the rest of the text."""
        ...


class StopStream:
    """Decodes the tokens of a text as they come, and shows nothing that a stop text could begin."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], decoder: Decoder | None = None
    ) -> None:
        """Begins a text.

        Args:
            tokenizer: The tokenizer.
            stops: The texts before which the text ends.
            decoder: What decodes the tokens; None for the tokenizer's own stream decoder.
        """
        self._decoder = decoder or tokenizer.stream_decoder()
        self._stops = StopTexts(tokenizer, stops)
        self._held_back = max((len(stop) for stop in stops), default=1) - 1
        self._text, self._num_shown = "", 0

    def push(self, token: int) -> str:
        """Takes one token, and returns the text that has become certain with it."""
        self._text += self._decoder.push(token)
        return self._next(len(self._text) - self._held_back)

    def finish(self) -> str:
        """Returns the rest of the text."""
        self._text += self._decoder.finish()
        return self._next(len(self._text))

    def _next(self, end: int) -> str:
        """Returns what wasn't shown yet, up to a place of the text or a stop text before it."""
        end = min(end, len(self._stops.cut(self._text)))
        start, self._num_shown = self._num_shown, max(self._num_shown, end)
        return self._text[start : self._num_shown]
