"""Cuts the text of a bash script into words and operators, without evaluating anything.

Quotes, escapes, comments, lines that go on with a backslash, substitutions, arrays and
here-documents are recognised as the manual of bash defines them (Shell Operation, Shell Syntax). A
word keeps its quotes and its dollar signs; `expansion` evaluates them.
"""

import re
from dataclasses import dataclass

_OPERATORS = ("&&", "||", ";;&", ";;", ";&", "|&", "\n", ";", "&", "|", "(", ")")
_REDIRECTION = re.compile(r"(\d*)(&>>|&>|<<<|<<-|<<|>>|>&|>\||<&|<>|<|>)")
_ARRAY = re.compile(r"[A-Za-z_]\w*(\[[^]]*\])?\+?=$")
_CLOSING = {"(": ")", "{": "}"}
# The quotes that may begin between a quote or a bracket and what closes it.
_INSIDE = {"'": "", '"': "`", "`": "'\"", "(": "'\"`", "{": "'\"`"}


@dataclass(frozen=True)
class Token:
    """A word or an operator of a script.

    Attributes:
        text: A word as it is written, or an operator; a line break is one, too.
        line: The number of its line, from 1.
        is_operator: Whether it is an operator.
    """

    text: str
    line: int
    is_operator: bool = False


class ScriptError(Exception):
    """The text of a script is no bash, as where a quote isn't closed."""


def tokens_of(text: str) -> list[Token]:
    """Returns the words and operators of a script; redirections and here-documents are left out.

    Raises:
        ScriptError: A quote or a bracket isn't closed.
    """
    return _Scanner(text.replace("\r\n", "\n")).tokens()


def closing(text: str, start: int) -> int:
    """Returns the position of what closes the quote or bracket at `start` of a text.

    Args:
        text: The text.
        start: The position of `'`, `"`, a backquote, `(` or `{`.

    Raises:
        ScriptError: Nothing closes it.
    """
    opening = text[start]
    end = _CLOSING.get(opening, opening)
    at = start + 1
    while at < len(text):
        char = text[at]
        if char == end:
            return at
        if opening == "'":
            at += 1
        elif char == "\\":
            at += 2
        elif char in _INSIDE[opening]:
            at = closing(text, at) + 1
        elif char == "$" and text[at + 1 : at + 2] in ("(", "{"):
            at = closing(text, at + 1) + 1
        elif char == opening and opening in "({":
            at = closing(text, at) + 1
        else:
            at += 1
    raise ScriptError(f"line {text.count(chr(10), 0, start) + 1}: {opening} isn't closed")


class _Scanner:
    """Reads a script from its first to its last character."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._found: list[Token] = []
        self._documents: list[str] = []  # ends of here-documents that begin at the next line

    def tokens(self) -> list[Token]:
        while self._at < len(self._text):
            self._step()
        return self._found

    def _step(self) -> None:
        """Reads one word, operator, redirection or comment, or the space between them."""
        text, at = self._text, self._at
        if text.startswith("\\\n", at):
            self._at += 2
        elif text[at] in " \t":
            self._at += 1
        elif text[at] == "#":
            end = text.find("\n", at)
            self._at = len(text) if end < 0 else end
        elif redirection := _REDIRECTION.match(text, at):
            self._at = redirection.end()
            self._redirect(redirection[2])
        elif operator := next((o for o in _OPERATORS if text.startswith(o, at)), None):
            self._add(operator, is_operator=True)
            self._at += len(operator)
            if operator == "\n":
                self._skip_documents()
        else:
            self._add(self._word())

    def _add(self, text: str, *, is_operator: bool = False) -> None:
        line = self._text.count("\n", 0, self._at - (0 if is_operator else len(text))) + 1
        self._found.append(Token(text, line, is_operator))

    def _redirect(self, operator: str) -> None:
        """Passes over where a redirection leads to."""
        while self._text[self._at : self._at + 1] in (" ", "\t"):
            self._at += 1
        word = self._word()
        if operator in ("<<", "<<-"):
            self._documents.append(re.sub(r"[\"'\\]", "", word))

    def _skip_documents(self) -> None:
        """Passes over the here-documents that begin at this line."""
        for end in self._documents:
            while self._at < len(self._text):
                stop = self._text.find("\n", self._at)
                stop = len(self._text) if stop < 0 else stop
                line = self._text[self._at : stop]
                self._at = min(stop + 1, len(self._text))
                if line.strip("\t") == end:
                    break
        self._documents = []

    def _word(self) -> str:
        """Reads the word at the current position, with its quotes."""
        text, start = self._text, self._at
        while self._at < len(text):
            char = text[self._at]
            is_array = char == "(" and _ARRAY.search(text[start : self._at])
            follows = text[self._at + 1 : self._at + 2]
            if char == "\\":
                self._at += 2
            elif char in "'\"`" or is_array:
                self._at = closing(text, self._at) + 1
            elif char == "$" and follows in ("(", "{"):
                self._at = closing(text, self._at + 1) + 1
            elif char == "$" and follows == "'":  # in $'...', a backslash escapes a quote
                self._at += 1
                end = re.compile(r"'(?:\\.|[^'\\])*'", re.S).match(text, self._at)
                self._at = end.end() if end else closing(text, self._at) + 1
            elif char in " \t\n;&|<>()":
                break
            else:
                self._at += 1
        self._at = min(self._at, len(text))
        return text[start : self._at]
