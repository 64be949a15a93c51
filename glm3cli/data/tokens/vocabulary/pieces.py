"""The vocabulary of a sentencepiece model, as ChatGLM2 and ChatGLM3 have it."""

import functools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sentencepiece

from glm3cli.config.family.members import VocabularyKind
from glm3cli.data.tokens.vocabulary.base import ByteDecoder, Vocabulary
from glm3cli.data.tokens.vocabulary.fast_encoder import FastEncoder
from glm3cli.data.tokens.vocabulary.files import FILE_NAME
from glm3cli.data.tokens.vocabulary.pieces_json import PREPENDS_NOTHING, SPACE, model_of
from glm3cli.errors import DataError

# A text of characters of which any normalisation would change at least one.
_UNCHANGED = "\u3000\uff41 \ufb01\t\u2460\x1f\u00a0 x"
_NO_CHARACTER = "\ufffd"  # shown for bytes that are no UTF-8


class Pieces(Vocabulary):
    """The pieces of a sentencepiece model.

    Attributes:
        pieces: The sentencepiece model, for code that writes it in another format.
    """

    kind: ClassVar[VocabularyKind] = "sentencepiece"
    end = 2
    filler = 0

    def __init__(self, path: Path, content: Any = None) -> None:
        """Reads the file.

        Args:
            path: A tokenizer.model, or a tokenizer.json.
            content: The content of the tokenizer.json.

        Raises:
            DataError: It isn't a sentencepiece model, or a tokenizer.json that none equals.
        """
        self.path = path
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            model = path.read_bytes() if content is None else model_of(content)
            loaded = self.pieces.LoadFromSerializedProto(model)
        except RuntimeError:  # what sentencepiece raises for bytes that aren't a model
            loaded = False
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"tokenizer {path} gives other ids than a sentencepiece model could: {error}",
                f"put the model's own {FILE_NAME} beside it",
            ) from None
        if not loaded:
            raise DataError(
                f"tokenizer {path} is not a sentencepiece model", f"fetch {path.name} again"
            )
        self.size = self.pieces.get_piece_size()
        self.hidden_spaces = 2 - len(self.pieces.decode_pieces([SPACE, SPACE]))
        self._fast: FastEncoder | None = None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        ids = self._fast.encode(text) if self._fast else None
        return self._encode(text) if ids is None else ids.tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Returns the ids of a text as int32 [number of tokens]."""
        ids = self._fast.encode(text) if self._fast else None
        return np.array(self._encode(text), dtype=np.int32) if ids is None else ids

    def encode_as_it_is(self, text: str) -> list[int]:
        """Returns the ids of a text in front of which no space is put."""
        return _encode(self._bare, text)

    def _encode(self, text: str) -> list[int]:
        """Returns the ids that sentencepiece gives; those of the fast encoder equal them."""
        return _encode(self.pieces, text)

    @functools.cached_property
    def _bare(self) -> sentencepiece.SentencePieceProcessor:
        """The same pieces, but that no space is put in front of a text."""
        bare = sentencepiece.SentencePieceProcessor()
        bare.LoadFromSerializedProto(self.serialized + PREPENDS_NOTHING)
        return bare

    @property
    def serialized(self) -> bytes:
        """The bytes of a tokenizer.model that has the pieces."""
        model: bytes = self.pieces.serialized_model_proto()
        return model

    def speed_up(self) -> None:
        """Makes encoding several times as fast, at the cost of a second now and some memory.

        Ids stay the same. Without the library that does it, or for a model that it can't handle,
        nothing changes.
        """
        self._fast = FastEncoder.of(self.pieces)

    def is_text(self, token: int) -> bool:
        """Returns whether an id stands for text: `<unk>`, `<s>` and `</s>` don't."""
        return 2 < token < self.size

    def piece(self, token: int) -> str | bytes:
        """Returns the text of a piece, with its spaces, or the byte that it stands for."""
        piece: str = self.pieces.id_to_piece(token)
        if self.pieces.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0xE4>
        if self.pieces.is_control(token):
            return ""
        return piece.replace(SPACE, " ")

    def name(self, token: int) -> str:
        """Returns the piece."""
        name: str = self.pieces.id_to_piece(token)
        return name

    def byte_decoder(self) -> ByteDecoder:
        """Returns a decoder that shows U+FFFD for each byte that is no UTF-8."""
        return _ByteDecoder()


def _encode(pieces: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Returns the ids that sentencepiece gives for any text."""
    try:
        ids: list[int] = pieces.EncodeAsIds(text)
    except (RuntimeError, UnicodeEncodeError):
        # JSON can spell half a surrogate pair, which is no character: encode U+FFFD instead.
        whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        ids = pieces.EncodeAsIds(whole)
    return ids


class _ByteDecoder:
    """Decodes as sentencepiece does."""

    def __init__(self) -> None:
        self._pending = b""

    def push(self, data: bytes) -> str:
        text, self._pending = _whole_characters(self._pending + data)
        return text

    def finish(self) -> str:
        rest, self._pending = self._pending, b""
        return _NO_CHARACTER * len(rest)


def _whole_characters(data: bytes) -> tuple[str, bytes]:
    """Decodes the complete UTF-8 characters of bytes.

    A byte that can't belong to a character becomes one U+FFFD, as in sentencepiece.

    Returns:
        The characters, and the remaining bytes, which begin a character that isn't complete.
    """
    text = ""
    while data:
        need = _character_size(data[0])
        if need and len(data) < need and all(0x80 <= byte < 0xC0 for byte in data[1:]):
            break
        try:
            text += data[: need or 1].decode()
            data = data[need or 1 :]
        except UnicodeDecodeError:
            text += _NO_CHARACTER
            data = data[1:]
    return text, data


def _character_size(first: int) -> int:
    """Returns the size in bytes of a UTF-8 character by its first byte; 0 for an invalid one."""
    if first < 0x80:
        return 1
    if 0xC2 <= first < 0xE0:
        return 2
    if 0xE0 <= first < 0xF0:
        return 3
    return 4 if 0xF0 <= first < 0xF5 else 0


def only_prepends_space(pieces: sentencepiece.SentencePieceProcessor) -> bool:
    """Returns whether a model changes nothing of a text but puts one space in front of it."""
    unchanged = pieces.decode(pieces.encode(_UNCHANGED)) == _UNCHANGED
    return unchanged and pieces.decode_pieces([SPACE, SPACE]) == " "
