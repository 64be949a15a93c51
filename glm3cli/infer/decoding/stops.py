"""Ends texts where a given string comes, wherever tokens begin and end."""

from collections.abc import Sequence

from glm3cli.data.tokens.tokenizer import Tokenizer


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
            size += 1 if isinstance(piece, int) else len(piece.encode())
        text = self._tokenizer.decode(tokens[max(first, 0) :])
        return any(stop in text for stop in self._stops)

    def cut(self, text: str) -> str:
        """Returns the text before the first of the strings."""
        ends = [text.find(stop) for stop in self._stops if stop in text]
        return text[: min(ends)] if ends else text
