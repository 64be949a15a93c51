"""ChatGLM3's tokenizer on sentencepiece alone: text to ids and back, also token by token.

The special tokens follow the sentencepiece vocabulary in a fixed order (source: ChatGLM3's
tokenization_chatglm.py, whose ids and decodings these are). Text that looks like one of them
stays text; only `special` and the prompt builder in `chat` yield their ids.
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
SPACE = "\u2581"  # how sentencepiece writes a space
# Any normalisation would change one of these.
_UNCHANGED = "\u3000\uff41 \ufb01\t\u2460\x1f\u00a0 x"
_NO_CHARACTER = "\ufffd"


class Tokenizer:
    """Text to token ids and back.

    `eod`, `pad` and `unique_identifiers` are what megatron-core's GPTDataset asks of the
    tokenizer in its config (megatron/core/datasets/gpt_dataset.py and megatron_dataset.py).

    Attributes:
        path: The tokenizer.model file.
        vocab_size: Number of ids: the sentencepiece pieces and the special tokens.
        prefix: The ids of `[gMASK] sop`, with which every sequence starts.
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
        # How many leading spaces the model adds itself and hides again: none, one, or any.
        self.hidden_spaces = 2 - len(pieces.decode_pieces([SPACE, SPACE]))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a tokenizer.model file, or the one in the folder `path`.

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
    def unique_identifiers(self) -> OrderedDict[str, object]:
        """What tells two tokenizers apart; part of the key of megatron-core's index cache."""
        return OrderedDict(
            {
                "class": type(self).__name__,
                "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest(),
                "vocab_size": self.vocab_size,
            }
        )

    @property
    def pieces(self) -> sentencepiece.SentencePieceProcessor:
        """The sentencepiece model, for those who write it down otherwise."""
        return self._pieces

    def special(self, name: str) -> int:
        """The id of a special token such as `<|user|>`."""
        return self._special[name]

    def is_special(self, token: int) -> bool:
        """Whether `token` stands for no text: a special token, eos, or beyond the vocabulary."""
        return not 2 < token < self._num_pieces

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without the prefix."""
        ids = self._fast.encode(text) if self._fast else None
        return self._encode(text) if ids is None else ids.tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `text`, without the prefix, as int32."""
        ids = self._fast.encode(text) if self._fast else None
        return np.array(self._encode(text), dtype=np.int32) if ids is None else ids

    def _encode(self, text: str) -> list[int]:
        """The ids that sentencepiece gives, which are the reference."""
        try:
            ids: list[int] = self._pieces.EncodeAsIds(text)
        except (RuntimeError, UnicodeEncodeError):
            # Half a surrogate pair (JSON can spell one) is no character: show it as unknown.
            whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            ids = self._pieces.EncodeAsIds(whole)
        return ids

    def hurry(self) -> None:
        """Makes encoding faster for much text, at the price of a second and some memory."""
        self._fast = FastEncoder.of(self._pieces)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; special tokens vanish, or show as their names."""
        decoder = StreamDecoder(self, skip_special)
        return "".join([decoder.push(token) for token in ids]) + decoder.finish()

    def stream_decoder(self, skip_special: bool = True) -> "StreamDecoder":
        """A decoder that takes one token at a time."""
        return StreamDecoder(self, skip_special)

    def token_name(self, token: int) -> str:
        """How a token is spelled in the vocabulary, for people to look at."""
        if 0 <= token < self._num_pieces:
            name: str = self._pieces.id_to_piece(token)
            return name
        piece = self.piece(token)
        return str(piece) or f"<{token}>"

    def piece(self, token: int) -> str | int:
        """What `token` stands for: text with its spaces, one byte as a number, or "" for none."""
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
    """Turns tokens into text as they come, never showing half a character.

    All that `push` and `finish` return is, joined, what `Tokenizer.decode` returns.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._pending = b""
        self._at_start = True

    def push(self, token: int) -> str:
        """Takes one token and returns the text that is certain by now."""
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
        """The rest: bytes that never became a character, each shown as U+FFFD."""
        rest, self._pending = self._pending, b""
        return _NO_CHARACTER * len(rest)

    def _without_hidden_space(self, piece: str) -> str:
        """Drops the space that encoding put in front of the text."""
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
    """Splits bytes into the characters they spell and the beginning of one more.

    A byte that can't belong to a character becomes U+FFFD by itself, as in sentencepiece.
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
    """Bytes of the UTF-8 character that starts with `first`; 0 if none does."""
    if first < 0x80:
        return 1
    if 0xC2 <= first < 0xE0:
        return 2
    if 0xE0 <= first < 0xF0:
        return 3
    return 4 if 0xF0 <= first < 0xF5 else 0


def keeps_text(pieces: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether all that a model does to a text is to put one space in front."""
    unchanged = pieces.decode(pieces.encode(_UNCHANGED)) == _UNCHANGED
    return unchanged and pieces.decode_pieces([SPACE, SPACE]) == " "
