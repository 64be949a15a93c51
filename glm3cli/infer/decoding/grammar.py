"""Answers that follow a JSON schema or a regular expression, by llguidance.

llguidance takes the bytes of all tokens, and says before each token which of them the text may go
on with: a mask that is made on the host and added to the logits. Text that is complete may only go
on where the grammar allows it; else a token that ends an answer is the only one left.
"""

import codecs
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm3cli.errors import ConfigError, DataError
from glm3cli.host.parsing import parse_json
from glm3cli.infer.decoding.schemas import without_unknown_formats

# What may stand between the parts of a JSON value.
WHITESPACE = r"[ \n]?"
# Where in a grammar that we have written something is wrong.
_PLACE = re.compile(r"^at \d+\(\d+\): ")

if TYPE_CHECKING:
    from torch import Tensor

    from glm3cli.data.tokens.tokenizer import Tokenizer


def read_grammar(json_schema: Path | None, regex: str | None) -> str | None:
    """Returns the grammar of the options, in llguidance's own form; None without one.

    Args:
        json_schema: A file with a JSON schema.
        regex: A regular expression, which the whole answer must match.

    Raises:
        DataError: The file can't be read.
        ConfigError: The schema or the expression is wrong, or has what llguidance doesn't know.
    """
    if json_schema is None and regex is None:
        return None
    if json_schema is not None:
        return from_schema(_read_schema(json_schema), f"--json-schema {json_schema}")
    from llguidance import LLMatcher

    return _checked(LLMatcher.grammar_from_regex(str(regex)), f"--regex {regex}")


def from_schema(schema: dict[str, Any] | bool, name: str) -> str:
    """Returns the grammar of the JSON values that a schema allows.

    Args:
        schema: The JSON schema.
        name: What the user calls the schema, for the error message.

    Raises:
        ConfigError: The schema is wrong, or has what llguidance doesn't know.
    """
    from llguidance import LLMatcher

    # A model may write spaces between the parts, but must come to an end.
    overrides = {"whitespace_pattern": WHITESPACE}
    try:
        known = without_unknown_formats(schema)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}", "give one that is plainer") from None
    return _checked(LLMatcher.grammar_from_json_schema(known, overrides=overrides), name)  # type: ignore[arg-type]


def from_lark(text: str, name: str) -> str:
    """Returns a grammar that is written in llguidance's dialect of Lark.

    Args:
        text: The grammar.
        name: What the user calls the grammar, for the error message.

    Raises:
        ConfigError: The grammar is wrong, or has what llguidance doesn't know.
    """
    from llguidance import LLMatcher

    return _checked(LLMatcher.grammar_from_lark(text), name)


def _checked(grammar: str, name: str) -> str:
    """Returns a grammar that is right.

    Raises:
        ConfigError: It is not.
    """
    from llguidance import LLMatcher

    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_wrong:
        reason = _reason(messages[0])
        raise ConfigError(f"{name}: {reason}", "mend it; llguidance's rules are on its home page")
    return grammar


def _reason(message: str) -> str:
    """Returns in one line what llguidance finds wrong, in the words of who has written it."""
    first, *more = message.strip().splitlines()
    first = _PLACE.sub("", first)
    if "coerce_one_of" in first:
        return "oneOf with schemas that allow the same value isn't known; write anyOf"
    # What is wrong with a regular expression stands below a drawing of it.
    errors = [line.removeprefix("error: ") for line in more if line.startswith("error: ")]
    return " ".join([first, *errors[:1]])


def _read_schema(path: Path) -> dict[str, Any] | bool:
    """Returns the JSON schema in a file.

    Raises:
        DataError: The file can't be read, or holds no schema.
    """
    try:
        schema = parse_json(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"--json-schema {path}: {error}", "give a JSON file") from None
    if not isinstance(schema, dict | bool):
        raise DataError(f"--json-schema {path} holds no JSON schema", "write a JSON object")
    return schema


class Grammar:
    """A grammar for the tokens of one tokenizer."""

    def __init__(self, grammar: str, tokenizer: "Tokenizer", ends: Sequence[int]) -> None:
        """Prepares a grammar.

        Args:
            grammar: The grammar, in llguidance's form.
            tokenizer: The tokenizer.
            ends: The tokens that end an answer.
        """
        self._grammar = grammar
        self._vocabulary = _vocabulary(tokenizer, tuple(ends))

    def begin(self) -> "Matcher":
        """Returns what follows one answer."""
        return Matcher(self._vocabulary, self._grammar)


class GrammarStream:
    """Turns the tokens of an answer into the text that a grammar has read, one by one."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Takes one token, and returns the text that has become certain with it."""
        return self._decoder.decode(_bytes_of(self._tokenizer, token))

    def finish(self) -> str:
        """Returns the text of the bytes that were held back."""
        return self._decoder.decode(b"", final=True)


def text_of(tokenizer: "Tokenizer", tokens: Sequence[int]) -> str:
    """Returns the text of an answer as a grammar has read it, with all spaces."""
    return b"".join(_bytes_of(tokenizer, token) for token in tokens).decode(errors="replace")


class Matcher:
    """Follows one answer, and says which tokens may come next."""

    def __init__(self, vocabulary: Any, grammar: str) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(vocabulary, grammar)
        self._num_read = 0

    def allowed(self, new: Sequence[int]) -> "Tensor":
        """Returns whether each token may come next, [entries of the tokenizer].

        None may if the grammar is too large for llguidance to follow any longer.

        Args:
            new: The tokens of the answer so far; each call has those of the call before it.
        """
        import numpy as np
        import torch

        self._matcher.consume_tokens(list(new[self._num_read :]))
        self._num_read = len(new)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()
        return allowed & (not self._matcher.is_error())


@functools.lru_cache(maxsize=2)
def _vocabulary(tokenizer: "Tokenizer", ends: tuple[int, ...]) -> Any:
    """Returns llguidance's form of a tokenizer."""
    from llguidance import LLTokenizer

    return LLTokenizer(_Entries(tokenizer, ends), eos_token=list(ends))  # type: ignore[arg-type]


class _Entries:
    """A tokenizer as llguidance asks for it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: "Tokenizer", ends: Sequence[int]) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id, self.bos_token_id = ends[0], None
        # Tokens without text of their own are special: no grammar allows them, but for the ends.
        self.special_token_ids = [i for i in ids if not _bytes_of(tokenizer, i)]
        special = set(self.special_token_ids)
        self.tokens = [b"<|%d|>" % i if i in special else _bytes_of(tokenizer, i) for i in ids]
        self._encode = tokenizer.encode
        self._hides_spaces = tokenizer.hidden_spaces > 0
        self._border = tokenizer.encode("\n")

    def __call__(self, text: str) -> list[int]:
        if not self._hides_spaces:
            return self._encode(text)
        # A line break merges with nothing: what comes after it has no hidden space in front.
        return self._encode(f"\n{text}")[len(self._border) :]


def _bytes_of(tokenizer: "Tokenizer", token: int) -> bytes:
    """Returns the bytes that a token adds to a text; none for a special one."""
    if tokenizer.is_special(token):
        return b""
    piece = tokenizer.piece(token)
    return piece if isinstance(piece, bytes) else piece.encode()
