"""The vocabulary of byte pairs with ranks, as GLM-4 has it.

A tokenizer.model has a line for each token: its bytes in base64, and its rank, which is its id. A
tokenizer.json of the later models has the same tokens as text, each byte written as one character
(Radford et al. 2019, byte-level BPE), and merges in the order of the ranks.
"""

import base64
import binascii
import codecs
import itertools
from pathlib import Path
from typing import Any, ClassVar

import tiktoken

from glm3cli.config.family.members import GLM4, VocabularyKind
from glm3cli.data.tokens.vocabulary.base import ByteDecoder, Vocabulary
from glm3cli.data.tokens.vocabulary.long_space import LONG_SPACE, without_long_space
from glm3cli.errors import DataError


class Ranks(Vocabulary):
    """Tokens that are bytes, joined in the order of their ranks.

    Attributes:
        pattern: The regular expression by which a text is cut into words.
        ranks: The id of each token, by its bytes.
    """

    kind: ClassVar[VocabularyKind] = "tiktoken"

    def __init__(self, path: Path, content: Any = None) -> None:
        """Reads the file.

        Args:
            path: A tokenizer.model, or a tokenizer.json.
            content: The content of the tokenizer.json.

        Raises:
            DataError: It holds no such tokens.
        """
        self.path = path
        self.pattern = GLM4.pattern
        try:
            if content is not None:
                self.ranks, self.pattern = _from_json(content)
            else:
                self.ranks = dict(map(_from_line, path.read_bytes().splitlines()))
            self._encoding = tiktoken.Encoding(
                path.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={}
            )
            is_whole = sorted(self.ranks.values()) == list(range(len(self.ranks)))
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
            is_whole = False
        if not is_whole:
            raise DataError(
                f"tokenizer {path} holds no byte pairs with ranks", f"fetch {path.name} again"
            )
        self.size = len(self.ranks)
        self._pieces = sorted(self.ranks, key=self.ranks.__getitem__)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; half a surrogate pair is encoded as U+FFFD."""
        if self.pattern != GLM4.pattern or not LONG_SPACE.search(text):
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        for part, is_word in without_long_space(text):
            encode = self._encoding._encode_single_piece if is_word else None
            ids += encode(part) if encode else self._encoding.encode_ordinary(part)
        return ids

    def is_text(self, token: int) -> bool:
        """Returns whether an id stands for text."""
        return 0 <= token < self.size

    def piece(self, token: int) -> str | bytes:
        """Returns the bytes of a token."""
        return self._pieces[token]

    def name(self, token: int) -> str:
        """Returns the bytes of a token as text."""
        return self._pieces[token].decode(errors="backslashreplace")

    def byte_decoder(self) -> ByteDecoder:
        """Returns a decoder that shows what Python shows for bytes that are no UTF-8."""
        return _ByteDecoder()


class _ByteDecoder:
    """Decodes as bytes.decode does."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def finish(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def has_ranks(path: Path) -> bool:
    """Returns whether a tokenizer.model begins as one with ranks does."""
    with path.open("rb") as file:
        line = file.readline(1024)
    try:
        _from_line(line)
    except (ValueError, binascii.Error):
        return False
    return True


def _from_line(line: bytes) -> tuple[bytes, int]:
    """Reads a line of a tokenizer.model: a token and its rank."""
    token, rank = line.split()
    return base64.b64decode(token, validate=True), int(rank)


def _from_json(content: Any) -> tuple[dict[bytes, int], str]:
    """Reads the tokens and the pattern of a tokenizer.json of byte pairs.

    Raises:
        ValueError, KeyError, TypeError: It is of another kind, or merges in another order than that
            of the ids.
    """
    model, steps = content["model"], content["pre_tokenizer"]
    steps = steps.get("pretokenizers", [steps])
    [pattern] = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    made = [model["vocab"]["".join(pair)] for pair in pairs]
    special = {token["id"] for token in content["added_tokens"]}.difference(made)
    ranks = {
        bytes(map(BYTES.__getitem__, token)): i
        for token, i in model["vocab"].items()
        if i not in special
    }
    if model["type"] != "BPE" or made != sorted(made):
        raise ValueError("its merges aren't in the order of its ids")
    return ranks, pattern


def _byte_characters() -> dict[str, int]:
    """Returns the byte that each character of byte-level BPE stands for.

    Printable characters of Latin-1 stand for themselves, and 256 and up for the other bytes.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = itertools.count(256)
    return {chr(b if b in plain else next(others)): b for b in range(256)}


BYTES = _byte_characters()
