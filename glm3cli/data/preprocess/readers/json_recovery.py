"""Finds the end of an array's element that isn't valid JSON, so that reading goes on behind it.

Two signs are looked for, and the first of them counts. A comma or ] that no bracket encloses ends
the element; since one of its quotes may be missing or stray, a text ends with its line, and with a
quote only where JSON allows an end. And where a whole object with the keys of an earlier element
follows a comma, it is the next element.
"""

import json
import re
from typing import Any

# How much text is searched for the end of one element.
MOST_CHARACTERS = 1 << 26
_MOST_KEYS = 1000  # of the combinations of keys that are remembered
_MARGIN = 64  # before the end of the window a mark isn't looked at: what follows may matter
_PART = re.compile(r'"(?:[^"\\\n]++|\\.|"(?!\s*[,:\]}]))*+(?:"|\n|\\?\Z)|[\[\]{},]', re.DOTALL)
_OBJECT = re.compile(r",\s*(\{)")
_FIRST_KEY = re.compile(r'\{\s*("(?:[^"\\\n]|\\.)*")\s*:')
_DECODER = json.JSONDecoder()


class Recovery:
    """Remembers the keys of an array's elements and finds where a bad element ends."""

    def __init__(self) -> None:
        self._keys: set[tuple[str, ...]] = set()

    def learn(self, element: Any) -> None:
        """Remembers the keys of a good element."""
        if isinstance(element, dict) and len(self._keys) < _MOST_KEYS:
            self._keys.add(tuple(element))

    def end_of_element(self, text: str, start: int, *, ended: bool) -> int | None:
        """Returns the place of the comma or ] behind a bad element.

        Args:
            text: The text that was read so far.
            start: Where the element begins.
            ended: Whether the text holds all that follows.

        Returns:
            The place, or None if it isn't in the text.
        """
        is_found, end = _end_by_brackets(text, start, ended=ended)
        for match in _OBJECT.finditer(text, start + 1, end):
            if self._is_element(text, start, match.start(1)):
                return match.start()
        return end if is_found else None

    def _is_element(self, text: str, bad: int, place: int) -> bool:
        """Returns whether an object with the keys of an element is at `place`."""
        try:
            value, _ = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            return False
        if self._keys:
            return tuple(value) in self._keys
        first, here = _FIRST_KEY.match(text, bad), _FIRST_KEY.match(text, place)
        return bool(first and here and first[1] == here[1])


def _end_by_brackets(text: str, start: int, *, ended: bool) -> tuple[bool, int]:
    """Looks for the first comma or ] from `start` on that no bracket encloses.

    Returns:
        Whether there is one, and its place, or else the place up to which there is none.
    """
    depth, place = 0, start
    for match in _PART.finditer(text, start):
        if not ended and match.end() > len(text) - _MARGIN:
            return False, place
        mark, place = match[0], match.start()
        if mark in "[{":
            depth += 1
        elif mark in ",]" and not depth:
            return True, place
        elif mark in "]}":
            depth = max(0, depth - 1)
    return False, len(text)
