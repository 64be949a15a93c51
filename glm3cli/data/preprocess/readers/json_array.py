"""Reads the elements of a JSON file's top-level array one by one, in bounded memory."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from glm3cli.errors import DataError

_BLOCK = 1 << 20
# A value that isn't read to its end yet fails to parse at most this many characters before the end
# of what was read: the longest token without quotes is "-Infinity".
_NEAR_END = 16


def read_json_array(file: BinaryIO, name: str, block: int = _BLOCK) -> Iterator[Any]:
    """Yields the elements of a JSON array, holding one element and one block of text at a time.

    Args:
        file: The file, opened for reading bytes, in UTF-8.
        name: What to call the file in an error message.
        block: The number of bytes to read at once.

    Raises:
        DataError: The file isn't an array, isn't valid JSON, or is cut short; says in which line.
    """
    return _ArrayReader(file, name, block).elements()


class _ArrayReader:
    """Parses an array out of a text of which only a window is in memory."""

    def __init__(self, file: BinaryIO, name: str, block: int) -> None:
        self._file = file
        self._name = name
        self._block = block
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._position = 0
        self._line = 1
        self._ended = False
        self._number = 0

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
            if mark == "]":
                return self._check_end()
            if not mark:
                raise self._cut_short()
            if mark != ",":
                problem = f"has {mark!r} after element {self._number}, expected , or ]"
                raise self._error(problem, "mend the file")
            self._position += 1

    def _element(self) -> Any:
        if not self._next_character():
            raise self._cut_short()
        want = self._block
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
                # A number at the end of the window may go on: "12" may be "123" or "12e+3".
                whole = not isinstance(value, int | float) or end < len(self._text) - 3
                if whole or self._ended:
                    self._position = end
                    return value
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string") or (
                    error.pos >= len(self._text) - _NEAR_END
                )
                if not unfinished or self._ended:
                    raise self._invalid(error) from None
            self._read(want)
            want *= 2  # else a huge element would be parsed from its start once per block

    def _invalid(self, error: json.JSONDecodeError) -> DataError:
        """Returns the error for text that can't be parsed: cut short, or not valid JSON."""
        if self._ended and error.pos >= len(self._text.rstrip()) - 1:
            return self._cut_short()
        if self._ended and error.msg.startswith("Unterminated string"):
            return self._cut_short()
        self._advance(error.pos)
        return self._error(f"is not valid JSON: {error.msg}", "mend the file")

    def _cut_short(self) -> DataError:
        self._advance(len(self._text))
        return self._error(
            f"ends within the array, at element {self._number}", "it is cut short: fetch it again"
        )

    def _check_end(self) -> None:
        self._position += 1
        if mark := self._next_character():
            raise self._error(f"has {mark!r} after the array", "keep only the array")

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
        try:
            self._text += self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise self._error(f"is not UTF-8: {error.reason}", "convert it to UTF-8") from None

    def _advance(self, position: int) -> None:
        """Drops the text before `position` and counts its lines."""
        self._line += self._text.count("\n", 0, position)
        self._text = self._text[position:]
        self._position = 0

    def _error(self, problem: str, hint: str) -> DataError:
        self._advance(self._position)
        return DataError(f"{self._name}:{self._line} {problem}", hint)


_DECODER = json.JSONDecoder()
