"""Encodes text with gigatoken, a library that is several times as fast as sentencepiece.

No other module uses that library. If it isn't installed, or gives other ids than sentencepiece for
a model, `FastEncoder.of` returns None, and sentencepiece encodes everything. The libraries differ
in text that spells a control piece such as `</s>`, which gigatoken encodes as that piece; such text
is left to sentencepiece.
"""

import logging

import numpy as np
import sentencepiece

# gigatoken's cache of words grows by about 2 bytes for every character of new text, without limit.
_CHARACTERS_BETWEEN_RENEWALS = 128 << 20
_PROBED_PIECES = 10_000  # about how many pieces are compared with sentencepiece
# A text that a normalisation, or another notion of white space, would encode otherwise.
_PROBE = "  a\tb\r\n\n  \u3000\uff41 \ufb01 \u2460\x1f\u00a0 \0 e\u0301 \u2581x  y\u200d\U0001f600 "
_log = logging.getLogger(__name__)


class FastEncoder:
    """Encodes text into the same ids as a sentencepiece model."""

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor) -> None:
        self._model: bytes = pieces.serialized_model_proto()
        ids = range(pieces.get_piece_size())
        self._controls = [pieces.id_to_piece(i) for i in ids if pieces.is_control(i)]
        self._renew()

    @classmethod
    def of(cls, pieces: sentencepiece.SentencePieceProcessor) -> "FastEncoder | None":
        """Returns an encoder for a model, or None if none is known to give the same ids."""
        try:
            encoder = cls(pieces)
            if all(encoder._agrees(pieces, text) for text in _probes(pieces)):
                return encoder
            reason = "gives other ids for this tokenizer"
        except ImportError:
            reason = "is not installed"
        except ValueError as error:  # a model of another kind
            reason = f"does not take this tokenizer ({error})"
        _log.info("gigatoken %s: sentencepiece encodes everything", reason)
        return None

    def encode(self, text: str) -> np.ndarray | None:
        """Encodes a text.

        Returns:
            The ids, int32 [number of tokens], or None if sentencepiece has to encode this text.
        """
        if any(control in text for control in self._controls):
            return None
        self._characters_left -= len(text)
        if self._characters_left < 0:
            self._renew()
        try:
            ids: np.ndarray = self._encode(text)
        except (TypeError, UnicodeEncodeError):  # the text has half a surrogate pair
            return None
        return ids.view(np.int32)

    def _renew(self) -> None:
        """Makes a new gigatoken tokenizer, whose cache of words is empty."""
        import gigatoken

        self._encode = gigatoken.Tokenizer.from_sentencepiece(self._model).encode
        self._characters_left = _CHARACTERS_BETWEEN_RENEWALS

    def _agrees(self, pieces: sentencepiece.SentencePieceProcessor, text: str) -> bool:
        """Returns whether this encoder gives sentencepiece's ids for a text, or leaves it to it."""
        ids = self.encode(text)
        return ids is None or ids.tolist() == pieces.EncodeAsIds(text)


def _probes(pieces: sentencepiece.SentencePieceProcessor) -> list[str]:
    """Returns texts to compare on: pieces from all over the vocabulary, and unusual characters."""
    ids = range(0, pieces.get_piece_size(), max(1, pieces.get_piece_size() // _PROBED_PIECES))
    # Text with a control piece is left to sentencepiece, and would prove nothing.
    joined = "".join(pieces.id_to_piece(i) for i in ids if not pieces.is_control(i))
    return [_PROBE, joined, joined.replace("\u2581", " ")]
