"""The tokens that a tokenizer's files list beside its vocabulary, and how text is cut at them.

transformers has two ways. A tokenizer.json finds tokens with `normalized` false in the text, and
then the others in each part between them, after it was normalised (tokenizers 0.23,
added_vocabulary.rs, extract_and_normalize). ChatGLM3's normalisation puts a space in front, so such
a token takes the space before it with it, and is found nowhere else. The models' own slow
tokenizers find all tokens in the text (transformers 4.57, tokenization_utils.py, tokenize).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glm3cli.data.tokens.vocabulary.files import JSON_NAME
from glm3cli.data.tokens.vocabulary.pieces_json import SPACE, has_pieces, prepends_space
from glm3cli.host.parsing import read_json

ADDED_NAME = "added_tokens.json"
_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class AddedToken:
    """A token that is listed beside the vocabulary.

    Attributes:
        id: Its id.
        content: Its text.
        special: Whether it is a special token, which decoding leaves out.
        single_word: Whether it isn't found within a word.
        lstrip: Whether white space before it belongs to it.
        rstrip: Whether white space behind it belongs to it.
        normalized: Whether it is found in the text as the tokenizer normalises it.
        takes_space: Whether it has a space in front, which the normalisation puts there.
    """

    id: int
    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    takes_space: bool = False

    @property
    def text(self) -> str:
        """What it stands for in a text that is decoded."""
        return f" {self.content}" if self.takes_space else self.content


def listed_tokens(folder: Path) -> list[AddedToken]:
    """Returns the tokens that the files of a folder list beside its vocabulary.

    A token in tokenizer.json counts more than one of the same text in tokenizer_config.json, and
    that more than one in added_tokens.json.
    """
    content = json_object(folder / JSON_NAME)
    takes_space = has_pieces(content) and prepends_space(content)
    of_json = content.get("added_tokens")
    of_config = json_object(folder / "tokenizer_config.json").get("added_tokens_decoder")
    ids = json_object(folder / ADDED_NAME).items()
    entries = [{"id": i, "content": name} for name, i in ids]
    for i, token in of_config.items() if isinstance(of_config, Mapping) else ():
        if isinstance(token, Mapping) and i.isdecimal():
            entries.append({**token, "id": int(i)})
    found = {token.content: replace(token, normalized=False) for token in _valid(entries)}
    for token in _valid(of_json if isinstance(of_json, list) else []):
        takes = takes_space and token.normalized
        found[token.content] = replace(token, takes_space=takes)
    return list(found.values())


def _valid(entries: Sequence[Any]) -> Iterator[AddedToken]:
    """Yields the tokens of a list's entries, without those that have no id or text."""
    for entry in entries:
        i, content = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (0, "")
        if isinstance(i, int) and isinstance(content, str) and content:
            yield AddedToken(i, content, **{flag: bool(entry.get(flag)) for flag in _FLAGS})


class Added:
    """Tokens that a user has added, which are found in text by their spelling.

    Attributes:
        tokens: The tokens, by their ids.
    """

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self.tokens = {token.id: token for token in sorted(tokens, key=lambda token: token.id)}
        self._plain = _Finder([token for token in tokens if not token.normalized])
        self._spaced = _Finder([token for token in tokens if token.takes_space])
        others = [token for token in tokens if token.normalized and not token.takes_space]
        self._normalized = _Finder(others)

    def parts(self, text: str) -> Iterator[tuple[str | int, bool]]:
        """Yields the parts of a text in order: a token's id, or text between tokens.

        With a text comes whether a space has to be put in front of it as in front of a whole text.
        It has the space already if it comes before or behind a token that takes its space along.
        """
        for part in self._plain.parts(text):
            for inner in self._normalized.parts(part) if isinstance(part, str) else [part]:
                if isinstance(inner, int):
                    yield inner, False
                    continue
                pieces = list(self._spaced.parts(f" {inner.replace(SPACE, ' ')}"))
                if len(pieces) == 1 and isinstance(pieces[0], str):
                    yield inner, True
                else:
                    yield from ((piece, False) for piece in pieces)


class _Finder:
    """Finds tokens of one kind, the longest one at each place."""

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self._of_text = {token.text.replace(SPACE, " "): token for token in tokens}
        texts = sorted(self._of_text, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None

    def parts(self, text: str) -> Iterator[str | int]:
        """Yields the ids of the tokens in a text and the texts between them, none of them empty."""
        done = 0
        for found in self._pattern.finditer(text) if self._pattern else ():
            token, (start, end) = self._of_text[found[0]], found.span()
            in_word = _WORD.match(text[start - 1 : start]) or _WORD.match(text, end)
            if token.single_word and in_word:
                continue
            # Where spaces are written as another character, they are no white space.
            kept = " " if token.takes_space else ""
            while token.lstrip and start > done and _is_space(text[start - 1], kept):
                start -= 1
            while token.rstrip and end < len(text) and _is_space(text[end], kept):
                end += 1
            if done < start:
                yield text[done:start]
            yield token.id
            done = end
        if done < len(text):
            yield text[done:]


def _is_space(character: str, kept: str) -> bool:
    """Returns whether a character is white space other than `kept`."""
    return character.isspace() and character != kept


def json_object(path: Path) -> Mapping[str, Any]:
    """Returns the content of a JSON file; nothing if it isn't there or holds no object."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
