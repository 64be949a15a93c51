r"""Cuts long runs of white space out of a text, which tiktoken's regular expressions can't match.

A run of some 100,000 spaces makes them end the program, since each space is one step of recursion.
By GLM-4's pattern, a run ends with a word up to its last line break (`\s*[\r\n]+`), and one of
what is left (`\s+(?!\S)`), whose last space belongs to what comes after the run. Line breaks right
behind a punctuation mark belong to that (` ?[^\s\p{L}\p{N}]+[\r\n]*`).
"""

import re
import unicodedata
from collections.abc import Iterator

# The characters with Unicode's property White_Space, as \s of tiktoken's expressions has them.
_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACE = re.compile(f"[{_SPACE}]{{2048,}}")
_LINE_BREAKS = re.compile(r"[\r\n]*")


def without_long_space(text: str) -> Iterator[tuple[str, bool]]:
    """Yields the parts of a text in order, and whether each is a word of white space by itself.

    No part is empty.
    """
    return (part for part in _parts(text) if part[0])


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Yields the parts, some of them empty."""
    done = 0
    for run in LONG_SPACE.finditer(text):
        start, end = run.span()
        if start and unicodedata.category(text[start - 1])[0] not in "LN":
            breaks = _LINE_BREAKS.match(text, start, end)
            start = breaks.end() if breaks else start
        lines = max(text.rfind("\n", start, end), text.rfind("\r", start, end)) + 1 or start
        left = end - 1 if end < len(text) else end
        yield text[done:start], False
        yield text[start:lines], True
        yield text[lines : max(left, lines)], True
        done = max(left, lines)
    yield text[done:], False
