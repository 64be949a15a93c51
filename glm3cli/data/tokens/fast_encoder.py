"""Encodes text with gigatoken, a library several times as fast as sentencepiece.

All that is known of that library is in this file: without it, or where it can't be relied on,
`FastEncoder.of` gives None, and sentencepiece does all the work. The ids are the same: gigatoken
differs only on text that spells a control piece such as </s>, which it takes for the piece.
"""

import logging

import numpy as np
import sentencepiece

# Its memory of words grows by about 2 bytes for every character of new text, without a limit.
_CHARACTERS_BETWEEN_RENEWALS = 128 << 20
_PROBED_PIECES = 10_000
# What a normalisation, or another idea of white space, would treat otherwise.
_PROBE = "  a\tb\r\n\n  \u3000\uff41 \ufb01 \u2460\x1f\u00a0 \0 e\u0301 \u2581x  y\u200d\U0001f600 "
_log = logging.getLogger(__name__)


class FastEncoder:
    """An encoder with the ids of a sentencepiece model."""

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor) -> None:
        self._model: bytes = pieces.serialized_model_proto()
        ids = range(pieces.get_piece_size())
        self._controls = [pieces.id_to_piece(i) for i in ids if pieces.is_control(i)]
        self._renew()

    @classmethod
    def of(cls, pieces: sentencepiece.SentencePieceProcessor) -> "FastEncoder | None":
        """An encoder for a model, or None where there is none that gives the same ids."""
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
        """The ids of a text, int32; None where only sentencepiece knows them."""
        if any(control in text for control in self._controls):
            return None
        self._room -= len(text)
        if self._room < 0:
            self._renew()
        try:
            ids: np.ndarray = self._encode(text)
        except (TypeError, UnicodeEncodeError):  # half a surrogate pair
            return None
        return ids.view(np.int32)

    def _renew(self) -> None:
        """Begins with an empty memory of words."""
        import gigatoken

        self._encode = gigatoken.Tokenizer.from_sentencepiece(self._model).encode
        self._room = _CHARACTERS_BETWEEN_RENEWALS

    def _agrees(self, pieces: sentencepiece.SentencePieceProcessor, text: str) -> bool:
        ids = self.encode(text)
        return ids is None or ids.tolist() == pieces.EncodeAsIds(text)


def _probes(pieces: sentencepiece.SentencePieceProcessor) -> list[str]:
    """Texts of pieces from all over the vocabulary, and an awkward one."""
    ids = range(0, pieces.get_piece_size(), max(1, pieces.get_piece_size() // _PROBED_PIECES))
    joined = "".join(pieces.id_to_piece(i) for i in ids)
    return [_PROBE, joined, joined.replace("\u2581", " ")]
