"""Encodes text word by word and remembers the words: the same ids several times as fast.

A piece that has a space only at its start can't reach over the end of a word, so the ids of a
text are those of its words, one after another. That holds for ChatGLM's vocabulary and is checked
for any other before it is relied on.
"""

import re
from itertools import chain

import sentencepiece

SPACE = "\u2581"  # how sentencepiece writes a space
# Any normalisation would change one of these, and could make spaces where words are not split.
_UNCHANGED = "\u3000\uff41 \ufb01\t\u2460\x1f\u00a0 x"
_MAX_CHARACTERS = 1 << 20  # of all words together: some 50 MB with their ids
# Texts with longer words on average (Chinese, JSON) gain nothing.
_MAX_MEAN_LENGTH = 9
# At the first of several spaces: sentencepiece joins the others with the word that follows.
_split = re.compile("(?<=[^ ]) ").split


class WordCache:
    """An encoder on top of sentencepiece with a bounded memory of words."""

    def __init__(
        self,
        pieces: sentencepiece.SentencePieceProcessor,
        max_characters: int = _MAX_CHARACTERS,
    ) -> None:
        self._pieces = pieces
        self._max_characters = max_characters
        self._words: dict[str, list[int]] = {}
        self._num_characters = 0

    @staticmethod
    def fits(pieces: sentencepiece.SentencePieceProcessor) -> bool:
        """Whether a model's ids are always those of its words."""
        names = map(pieces.id_to_piece, range(pieces.get_piece_size()))
        return (
            not any(SPACE in name.lstrip(SPACE) for name in names)
            and keeps_text(pieces)
            and not pieces.is_unknown(pieces.piece_to_id(SPACE))
        )

    def encode(self, text: str) -> list[int]:
        """The same ids as sentencepiece's own for `text`."""
        if text.count(" ") * _MAX_MEAN_LENGTH <= len(text) or SPACE in text:
            ids: list[int] = self._pieces.EncodeAsIds(text)
            return ids
        is_plain = "  " not in text and not text.startswith(" ")
        words = text.split(" ") if is_plain else _split(text)
        self._learn(words)
        return list(chain.from_iterable(map(self._words.__getitem__, words)))

    def _learn(self, words: list[str]) -> None:
        new = [word for word in set(words) if word not in self._words]
        if not new:
            return
        if self._num_characters > self._max_characters:
            self._words.clear()
            self._num_characters = 0
            new = list(set(words))
        self._num_characters += sum(map(len, new))
        self._words.update(zip(new, self._pieces.Encode(new, num_threads=1), strict=True))
        # A text that ends with a space has an empty last word.
        self._words[""] = [self._pieces.piece_to_id(SPACE)]


def keeps_text(pieces: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether all that a model does to a text is to put one space in front."""
    unchanged = pieces.decode(pieces.encode(_UNCHANGED)) == _UNCHANGED
    return unchanged and pieces.decode_pieces([SPACE, SPACE]) == " "
