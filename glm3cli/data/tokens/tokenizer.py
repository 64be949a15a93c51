"""ChatGLM3's tokenizer on sentencepiece alone: turns text into token ids and back.

The ids of the special tokens follow those of the sentencepiece vocabulary in a fixed order. Ids and
decoded text are the same as those of ChatGLM3's tokenization_chatglm.py. Text that is spelled like
a special token is encoded as text; only `Tokenizer.special` and the builders in `chat` give the ids
of special tokens.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from glm3cli.data.tokens.fast_encoder import FastEncoder
from glm3cli.errors import DataError

FILE_NAME = "tokenizer.model"
SPECIAL_TOKENS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
SPACE = "\u2581"  # what sentencepiece writes for a space
# A text of characters of which any normalisation would change at least one.
_UNCHANGED = "\u3000\uff41 \ufb01\t\u2460\x1f\u00a0 x"
_NO_CHARACTER = "\ufffd"  # shown for bytes that are no UTF-8


class Tokenizer:
    """Turns text into token ids and back.

    It can be pickled: a copy in another process loads the file again.

    Attributes:
        path: The path of the tokenizer.model file.
        vocab_size: The number of ids: the sentencepiece pieces and the special tokens.
        prefix: The ids of `[gMASK] sop`, with which every sequence starts.
        eos_id: The id of the end token, `</s>`.
        pad_id: The id that fills up short samples.
        eod: `eos_id` under the name that megatron-core's GPTDataset asks for.
        pad: `pad_id` under the name that megatron-core's GPTDataset asks for.
        hidden_spaces: How many leading spaces decoding leaves out because encoding puts them in:
            0 for none, 1 for one, 2 for any number.
    """

    eos_id = 2
    pad_id = 0
    eod = eos_id
    pad = pad_id

    def __init__(self, path: Path, pieces: sentencepiece.SentencePieceProcessor) -> None:
        self.path = path
        self._pieces = pieces
        self._fast: FastEncoder | None = None
        self._num_pieces: int = pieces.get_piece_size()
        self._special = {name: self._num_pieces + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = self._num_pieces + len(SPECIAL_TOKENS)
        self.prefix = (self._special["[gMASK]"], self._special["sop"])
        self.hidden_spaces = 2 - len(pieces.decode_pieces([SPACE, SPACE]))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a tokenizer.model file.

        Args:
            path: The file, or a folder that has a tokenizer.model.

        Raises:
            DataError: The file is missing or isn't a sentencepiece model.
        """
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise DataError(
                f"tokenizer {file} does not exist",
                f"give a model folder that has a {FILE_NAME}, or that file",
            )
        pieces = sentencepiece.SentencePieceProcessor()
        try:
            loaded = pieces.LoadFromSerializedProto(file.read_bytes())
        except RuntimeError:  # what sentencepiece raises for bytes that aren't a model
            loaded = False
        if not loaded:
            raise DataError(
                f"tokenizer {file} is not a sentencepiece model", f"fetch {file.name} again"
            )
        return cls(file, pieces)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Tokenizer.load, (self.path,))

    @property
    def sha256(self) -> str:
        """The SHA-256 of the tokenizer.model file, in hexadecimal digits."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def unique_identifiers(self) -> OrderedDict[str, object]:
        """What distinguishes this tokenizer from others, for the key of an index cache.

        megatron-core's GPTDataset reads it (source: megatron_dataset.py).
        """
        return OrderedDict(
            {
                "class": type(self).__name__,
                "sha256": self.sha256,
                "vocab_size": self.vocab_size,
            }
        )

    @property
    def pieces(self) -> sentencepiece.SentencePieceProcessor:
        """The sentencepiece model, for code that writes it in another format."""
        return self._pieces

    def special(self, name: str) -> int:
        """Returns the id of a special token such as `<|user|>`."""
        return self._special[name]

    def is_special(self, token: int) -> bool:
        """Returns whether an id has no text: `<unk>`, `<s>`, `</s>`, or any beyond the pieces."""
        return not 2 < token < self._num_pieces

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without the prefix."""
        ids = self._fast.encode(text) if self._fast else None
        return self._encode(text) if ids is None else ids.tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Returns the ids of a text, without the prefix, as int32 [number of tokens]."""
        ids = self._fast.encode(text) if self._fast else None
        return np.array(self._encode(text), dtype=np.int32) if ids is None else ids

    def _encode(self, text: str) -> list[int]:
        """Returns the ids that sentencepiece gives; those of the fast encoder equal them."""
        try:
            ids: list[int] = self._pieces.EncodeAsIds(text)
        except (RuntimeError, UnicodeEncodeError):
            # JSON can spell half a surrogate pair, which is no character: encode U+FFFD instead.
            whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            ids = self._pieces.EncodeAsIds(whole)
        return ids

    def use_fast_encoder(self) -> None:
        """Makes encoding several times as fast, at the cost of a second now and some memory.

        Ids stay the same. Without the library that does it, or for a tokenizer that it can't
        handle, nothing changes.
        """
        self._fast = FastEncoder.of(self._pieces)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text of ids.

        Args:
            ids: The token ids.
            skip_special: Leaves special tokens out of the text; else they appear by their names.
        """
        decoder = StreamDecoder(self, skip_special)
        return "".join([decoder.push(token) for token in ids]) + decoder.finish()

    def stream_decoder(
        self, skip_special: bool = True, *, goes_on: bool = False
    ) -> "StreamDecoder":
        """Returns a decoder that takes one token at a time.

        Args:
            skip_special: Leaves special tokens out of the text; else they appear by their names.
            goes_on: Whether a text stands before, so that no leading space is a hidden one.
        """
        return StreamDecoder(self, skip_special, at_start=not goes_on)

    def token_name(self, token: int) -> str:
        """Returns how the vocabulary spells an id, to be shown to people."""
        if 0 <= token < self._num_pieces:
            name: str = self._pieces.id_to_piece(token)
            return name
        piece = self.piece(token)
        return str(piece) or f"<{token}>"

    def piece(self, token: int) -> str | int:
        """Returns what one id stands for.

        Returns:
            A str with the text, spaces included (the name for a special token, "" for an id
            without text), or an int for an id that stands for one byte of UTF-8.
        """
        if self.is_special(token):
            i = token - self._num_pieces
            return SPECIAL_TOKENS[i] if 0 <= i < len(SPECIAL_TOKENS) else ""
        piece: str = self._pieces.id_to_piece(token)
        if self._pieces.is_byte(token):
            return int(piece[3:5], 16)  # <0xE4>
        if self._pieces.is_control(token):
            return ""
        return piece.replace(SPACE, " ")


class StreamDecoder:
    """Turns tokens into text one by one and holds back bytes until they form a character.

    The joined results of `push` and `finish` equal the result of `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, at_start: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._pending = b""
        self._at_start = at_start

    def push(self, token: int) -> str:
        """Takes one token and returns the text that has become certain with it."""
        piece = self._tokenizer.piece(token)
        if isinstance(piece, int):
            self._pending += bytes([piece])
            text, self._pending = _whole_characters(self._pending)
            self._at_start = self._at_start and not text
            return text
        text = self.finish()
        if self._tokenizer.is_special(token) and self._skip_special:
            return text
        self._at_start = self._at_start and not text
        return text + self._without_hidden_space(piece)

    def finish(self) -> str:
        """Returns the text of the bytes held back: U+FFFD for each of them."""
        rest, self._pending = self._pending, b""
        return _NO_CHARACTER * len(rest)

    def _without_hidden_space(self, piece: str) -> str:
        """Removes from a piece the leading space that encoding put in front of the text."""
        hidden = self._tokenizer.hidden_spaces
        if not self._at_start or not piece:
            return piece
        if hidden and piece.startswith(" "):
            piece = piece[1:]
            self._at_start = hidden > 1 and not piece
        else:
            self._at_start = False
        return piece


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
