"""Reads the elements of a JSON file's top-level array one by one, in bounded memory."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from glm3cli.data.preprocess.readers.bad_rows import BadRow, not_utf8
from glm3cli.data.preprocess.readers.chunks import DamageError
from glm3cli.data.preprocess.readers.json_recovery import MOST_CHARACTERS, Recovery
from glm3cli.data.preprocess.readers.json_text import (
    TOO_DEEP,
    is_too_deep,
    json_problem,
    may_be_too_deep,
)
from glm3cli.data.preprocess.readers.unpacked import check_end

_BLOCK = 1 << 20
# A value that isn't read to its end yet fails to parse at most this many characters before the end
# of what was read: the longest token without quotes is "-Infinity".
_NEAR_END = 16
_SHOWN_CHARACTERS = 200  # of a bad element
_STARTS = '{["'  # how an element may begin


def read_json_array(file: BinaryIO, name: str, block: int = _BLOCK) -> Iterator[Any]:
    """Yields the elements of a JSON array, holding one element and one block of text at a time.

    In the place of an element that isn't valid JSON it yields a `BadRow`, and goes on with the next
    element.

    Args:
        file: The file, opened for reading bytes, in UTF-8.
        name: What to call the file in an error message.
        block: The number of bytes to read at once.

    Raises:
        DamageError: The file isn't an array, is cut short, or no element can be found behind a bad
            one; says in which line.
    """
    return _ArrayReader(file, name, block).elements()


class _ArrayReader:
    """Parses an array out of a text of which only a window is in memory."""

    def __init__(self, file: BinaryIO, name: str, block: int) -> None:
        self._file = file
        self._name = name
        self._block = block
        # Bytes that aren't UTF-8 become half surrogate pairs once `_is_dirty`.
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._is_dirty = False
        self._text = ""
        self._position = 0
        self._line = 1
        self._dropped = 0  # characters before the window
        self._ended = False
        self._number = 0
        self._recovery = Recovery()

    def elements(self) -> Iterator[Any]:
        if self._next_character() != "[":
            raise self._error("is not a JSON array", "start it with [, or name it .jsonl")
        self._position += 1
        if self._next_character() == "]":
            return self._check_end()
        while True:
            self._number += 1
            yield self._element()
            mark = self._next_character()
            if mark and mark not in ",]":
                problem = f"has {mark!r} after element {self._number}, expected , or ]"
                if mark in _STARTS:  # only the comma is missing
                    yield self._bad_row(problem, self._position)
                    continue
                yield self._skip_element(problem, self._position)
                mark = self._next_character()
            if mark == "]":
                return self._check_end()
            if not mark:
                raise self._cut_short()
            self._position += 1

    def _element(self) -> Any:
        """Parses the next element; returns a `BadRow` in its place if it is bad."""
        if not self._next_character():
            raise self._cut_short()
        want = self._block
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
                # A number at the end of the window may go on: "12" may be "123" or "12e+3".
                whole = not isinstance(value, int | float) or end < len(self._text) - 3
                if whole or self._ended:
                    return self._checked(value, end)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string") or (
                    error.pos >= len(self._text) - _NEAR_END
                )
                if not unfinished or self._ended:
                    return self._skip_element(f"is not valid JSON: {error.msg}", error.pos)
            except (ValueError, RecursionError) as error:
                return self._skip_element(json_problem(error), self._position)
            self._read(want)
            want *= 2  # else a huge element would be parsed from its start once per block

    def _checked(self, value: Any, end: int) -> Any:
        """Takes a parsed element; returns a `BadRow` if it isn't UTF-8 or is nested too deep."""
        start, self._position = self._position, end
        problem = ""
        if may_be_too_deep(self._text, start, end) and is_too_deep(value):
            problem = TOO_DEEP
        elif self._is_dirty:
            try:
                self._text[start:end].encode("utf-8")
            except UnicodeEncodeError:
                problem = not_utf8(self._text[start:end].encode("utf-8", "surrogateescape"))
        if problem:
            return self._bad_row(problem, start)
        self._recovery.learn(value)
        return value

    def _skip_element(self, problem: str, place: int) -> BadRow:
        """Goes to the end of a bad element: to the comma or the ] behind it.

        Args:
            problem: What is wrong with the element.
            place: Where in the window it is wrong.

        Raises:
            DamageError: The element has no end; what follows is lost.
        """
        bad = self._bad_row(problem, place)
        while True:
            end = self._recovery.end_of_element(self._text, self._position, ended=self._ended)
            if end is not None:
                self._position = end
                return bad
            if self._ended or len(self._text) > MOST_CHARACTERS:
                break
            self._read(max(self._block, len(self._text)))
        if self._ended and not self._text.endswith("]"):
            raise self._cut_short()
        raise DamageError(
            f"{self._name}:{bad.line} {problem}, and the end of this element can't be found",
            "mend the file",
            self._share_left(),
        )

    def _share_left(self) -> float:
        """Returns the share of the file from this position on; reads the file to its end."""
        left = len(self._text) - self._position
        while block := self._file.read(_BLOCK):
            left += len(block)
        return left / (self._dropped + self._position + left)

    def _bad_row(self, problem: str, place: int) -> BadRow:
        """Returns the bad row for the element at this position, which is wrong at `place`."""
        text = self._text[self._position : self._position + _SHOWN_CHARACTERS]
        line = self._line + self._text.count("\n", 0, place)
        return BadRow(problem, text.encode("utf-8", "backslashreplace").decode(), line=line)

    def _cut_short(self) -> DamageError:
        self._advance(len(self._text))
        return self._error(
            f"ends within the array, at element {self._number}", "it is cut short: fetch it again"
        )

    def _check_end(self) -> None:
        self._position += 1
        if mark := self._next_character():
            error = self._error(f"has {mark!r} after the array", "keep only the array")
            error.share = self._share_left()
            raise error

    def _next_character(self) -> str:
        """Returns the next character that isn't white space, without taking it; "" at the end."""
        while True:
            while self._position < len(self._text):
                if not self._text[self._position].isspace():
                    return self._text[self._position]
                self._position += 1
            if self._ended:
                return ""
            self._read(self._block)

    def _read(self, size: int) -> None:
        self._advance(self._position)
        data = self._file.read(size)
        self._ended = not data
        if self._ended:
            check_end(self._file)
        try:
            self._text += self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError:
            self._is_dirty, self._decode.errors = True, "surrogateescape"
            self._text += self._decode.decode(data, final=self._ended)
        if self._ended:
            self._text = self._text.rstrip()

    def _advance(self, position: int) -> None:
        """Drops the text before `position` and counts its lines."""
        self._line += self._text.count("\n", 0, position)
        self._text = self._text[position:]
        self._dropped += position
        self._position = 0

    def _error(self, problem: str, hint: str) -> DamageError:
        self._advance(self._position)
        return DamageError(f"{self._name}:{self._line} {problem}", hint)


_DECODER = json.JSONDecoder()
