"""The tokenizer of a model of the family: turns text into token ids and back.

The tokens of text come from the folder's vocabulary (see `vocabulary`), and the special tokens from
its other files, or from the table of members where these don't name them. Ids and decoded text are
those of each model's own tokenizer. Text that is spelled like a special token is encoded as text;
only `Tokenizer.special` and the chat formats give the ids of special tokens. Tokens that a user has
added, and not as special ones, are found in text (see `added`).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm3cli.config.family.members import Member, Tokens
from glm3cli.config.family.recognise import recognise
from glm3cli.data.tokens.added import Added, AddedToken, json_object, listed_tokens
from glm3cli.data.tokens.formats.base import ChatFormat
from glm3cli.data.tokens.formats.table import FORMATS
from glm3cli.data.tokens.vocabulary.base import Vocabulary
from glm3cli.data.tokens.vocabulary.opening import open_vocabulary
from glm3cli.errors import DataError


class Tokenizer:
    """Turns text into token ids and back.

    It can be pickled: a copy in another process loads the files again.

    Attributes:
        path: The path of the vocabulary's file.
        member: The member of the family that the folder is, or one with its traits.
        vocabulary: The tokens of text.
        special_tokens: The ids of the special tokens, by name.
        added: The tokens that a user has added.
        vocab_size: The number of ids: those of the vocabulary, the special and the added tokens.
        prefix: The ids of `[gMASK] sop`, with which every sequence starts.
        eos_id: The id of the end token.
        pad_id: The id that fills up short samples.
        ends: The ids that end an answer, the end token's first.
        eod: `eos_id` under the name that megatron-core's GPTDataset asks for.
        pad: `pad_id` under the name that megatron-core's GPTDataset asks for.
        hidden_spaces: How many leading spaces decoding leaves out because encoding puts them in:
            0 for none, 1 for one, 2 for any number.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Reads the special and the added tokens beside a vocabulary.

        Raises:
            DataError: The files give the id of a special token that is needed to another one.
        """
        self.path = vocabulary.path
        self.vocabulary = vocabulary
        self.hidden_spaces = vocabulary.hidden_spaces
        folder = self.path.parent
        self.member: Member = recognise(folder, vocabulary.kind)
        traits = self.member.tokens
        listed = listed_tokens(folder)
        self.special_tokens = _special_tokens(listed, traits, vocabulary.size)
        named = self.special_tokens.keys() | traits.special
        self.added = Added([t for t in listed if not t.special and t.content not in named])
        self._names = {i: token.content for i, token in self.added.tokens.items()}
        self._names |= {i: name for name, i in self.special_tokens.items()}
        self.vocab_size = max([vocabulary.size, *(i + 1 for i in self._names)])
        _check_special(folder, self.special_tokens, traits)
        self.prefix = tuple(self.special(name) for name in traits.prefix)
        end = vocabulary.end if traits.end is None else self.special(traits.end)
        assert end is not None  # every kind has it here or there
        self.eos_id = self.eod = end
        self.pad_id = self.pad = end if vocabulary.filler is None else vocabulary.filler
        others = _listed_ends(folder) or [self.special(name) for name in traits.ends]
        self.ends = tuple(dict.fromkeys([end, *(i for i in others if i in self._names)]))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a tokenizer.

        Args:
            path: A model folder, or its tokenizer.model or tokenizer.json.

        Raises:
            DataError: The file is missing or isn't a vocabulary, or the tokens beside it don't fit.
        """
        return cls(open_vocabulary(path))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Tokenizer.load, (self.path,))

    @property
    def sha256(self) -> str:
        """The SHA-256 of the vocabulary's file and any added tokens, in hexadecimal digits."""
        added = repr(list(self.added.tokens.values())) if self.added.tokens else ""
        return hashlib.sha256(self.path.read_bytes() + added.encode()).hexdigest()

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
    def chat(self) -> ChatFormat:
        """How the model's turns are written."""
        return FORMATS[self.member.chat]

    @property
    def is_usual(self) -> bool:
        """Whether the tokens beside the vocabulary are those of the table of members."""
        return not self.added.tokens and tuple(self.special_tokens) == self.member.tokens.special

    def special(self, name: str) -> int:
        """Returns the id of a special token such as `<|user|>`."""
        return self.special_tokens[name]

    def is_special(self, token: int) -> bool:
        """Returns whether an id has no text: a special token, or an id without a token."""
        return not (self.vocabulary.is_text(token) or token in self.added.tokens)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without the prefix."""
        if not self.added.tokens:
            return self.vocabulary.encode(text)
        ids: list[int] = []
        for part, is_whole in self.added.parts(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                encode = self.vocabulary.encode if is_whole else self.vocabulary.encode_as_it_is
                ids += encode(part)
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """Returns the ids of a text, without the prefix, as int32 [number of tokens]."""
        if self.added.tokens:
            return np.array(self.encode(text), dtype=np.int32)
        return self.vocabulary.encode_array(text)

    def use_fast_encoder(self) -> None:
        """Makes encoding as fast as it gets, at the cost of a second now and some memory.

        Ids stay the same.
        """
        self.vocabulary.speed_up()

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
        if 0 <= token < self.vocabulary.size and token not in self._names:
            return self.vocabulary.name(token)
        return self._names.get(token) or f"<{token}>"

    def piece(self, token: int) -> str | bytes:
        """Returns what one id stands for.

        Returns:
            A str with the text, spaces included (the name for a special token, "" for an id
            without text), or bytes of UTF-8, which needn't be whole characters.
        """
        if token in self.added.tokens:
            return self.added.tokens[token].text
        if self.is_special(token):
            return self._names.get(token, "")
        return self.vocabulary.piece(token)


class StreamDecoder:
    """Turns tokens into text one by one and holds back bytes until they form a character.

    The joined results of `push` and `finish` equal the result of `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, at_start: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._bytes = tokenizer.vocabulary.byte_decoder()
        self._at_start = at_start

    def push(self, token: int) -> str:
        """Takes one token and returns the text that has become certain with it."""
        piece = self._tokenizer.piece(token)
        if isinstance(piece, bytes):
            text = self._bytes.push(piece)
            self._at_start = self._at_start and not text
            return text
        text = self.finish()
        if self._tokenizer.is_special(token) and self._skip_special:
            return text
        self._at_start = self._at_start and not text
        return text + self._without_hidden_space(piece)

    def finish(self) -> str:
        """Returns the text of the bytes held back, which are no whole character."""
        return self._bytes.finish()

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


def _special_tokens(listed: Sequence[AddedToken], traits: Tokens, size: int) -> dict[str, int]:
    """Returns the ids of the special tokens by name: those of the table, and those of the files.

    Args:
        listed: The tokens that the files list; an id that they give counts more than the table's.
        traits: The row of the table.
        size: The number of the vocabulary's tokens, behind which the special ones stand.
    """
    found = {
        token.content: token.id
        for token in listed
        if token.id >= size and (token.special or token.content in traits.special)
    }
    taken = {token.id for token in listed}
    usual = {name: size + i for i, name in enumerate(traits.special)}
    all_of_them = {n: i for n, i in usual.items() if n not in found and i not in taken} | found
    return dict(sorted(all_of_them.items(), key=lambda item: item[1]))


def _check_special(folder: Path, special: Mapping[str, int], traits: Tokens) -> None:
    """Refuses a tokenizer whose files give the id of a token that is needed to another one.

    Raises:
        DataError: They do.
    """
    needed = (*traits.prefix, *traits.ends, *([traits.end] if traits.end else []))
    missing = [name for name in needed if name not in special]
    if missing:
        raise DataError(
            f"the tokenizer files in {folder} have no {', '.join(missing)}, and give the id to "
            "another token",
            "take the model's own tokenizer_config.json and tokenizer.json",
        )


def _listed_ends(folder: Path) -> list[int]:
    """Returns the ends of answers that the files of a folder list; none if they list none."""
    for name in ("generation_config.json", "config.json"):
        listed = json_object(folder / name).get("eos_token_id")
        if isinstance(listed, list) and all(isinstance(i, int) for i in listed):
            return listed
    return []
