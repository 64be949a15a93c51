"""Expands the words of a bash script: quotes, variables, arrays and arithmetic.

Nothing is executed: a command substitution stays as it is written, unless it only takes a path
apart (`dirname`, `basename`, `pwd`, `realpath`). The rules are those of the manual of bash (Shell
Expansions); files aren't looked for, so `*` stays `*`.
"""

import ast
import operator
import os.path
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glm3cli.config.scripts.words import closing, tokens_of

_NAME = re.compile(r"[A-Za-z_]\w*|[0-9]|[@*#?$!-]", re.ASCII)
_PARAMETER = re.compile(
    r"(?P<mark>[#!]?)(?P<name>[A-Za-z_]\w*|\d+|[@*#])(?:\[(?P<index>[^]]*)\])?(?P<rest>.*)",
    re.S | re.ASCII,
)
_DEFAULT = re.compile(r":?[-=+?]")
# Variables that a shell or its environment sets, which scripts only add to.
_OF_SHELLS = {"PATH", "LD_LIBRARY_PATH", "PYTHONPATH"} | {"HOME", "USER", "PWD", "HOSTNAME"}
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", "'": "'", '"': '"'}
_ARITHMETIC: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass
class Variables:
    """The variables of a script, and what was found while words were expanded.

    Attributes:
        values: The value of every variable, a text or the items of an array.
        arguments: The script's arguments, $1 and the following.
        script: The path of the script, $0.
        unset: The names that were used without having a value.
        unrun: The command substitutions that were left as they are.
    """

    values: dict[str, str | list[str]]
    arguments: list[str]
    script: str
    unset: list[str] = field(default_factory=list)
    unrun: list[str] = field(default_factory=list)

    def items(self, name: str) -> list[str]:
        """Returns the values of a variable: the items of an array, the arguments for @ and *.

        A variable without a value has none, and its name is noted.
        """
        if name in "@*":
            return list(self.arguments)
        if name == "0":
            return [self.script]
        if name.isdigit():
            number = int(name) - 1
            found: str | list[str] | None = (
                self.arguments[number] if number < len(self.arguments) else None
            )
        else:
            found = self.values.get(name)
        if found is None:
            if name == "#":
                return [str(len(self.arguments))]
            if name not in "?$!-" and name not in _OF_SHELLS:
                self.unset.append(name)
            return []
        return list(found) if isinstance(found, list) else [found]

    def has(self, name: str) -> bool:
        """Returns whether a variable has a value that isn't empty."""
        if name.isdigit():
            return 0 < int(name) <= len(self.arguments)
        return bool(self.arguments) if name in "@*" else bool(self.values.get(name))


def expand(words: Sequence[str], variables: Variables) -> list[str]:
    """Returns the fields that words become, without their quotes.

    Args:
        words: The words as they are written.
        variables: The variables, which ${NAME:=VALUE} changes.

    Raises:
        ScriptError: A quote or a bracket isn't closed.
    """
    return [found for word in words for found in _Expander(variables).fields(word)]


def expand_one(word: str, variables: Variables) -> str:
    """Returns the text that a word becomes where it isn't split, as in an assignment.

    Raises:
        ScriptError: A quote or a bracket isn't closed.
    """
    return _Expander(variables).joined(word)


@dataclass
class _Expander:
    """Expands one word at a time into pieces: a text, and whether it may be split at spaces."""

    variables: Variables

    def joined(self, word: str) -> str:
        return " ".join("".join(text for text, _ in part) for part in self._parts(word))

    def fields(self, word: str) -> list[str]:
        found: list[str] = []
        for part in self._parts(word):
            found += _split(part)
        return found

    def _parts(self, word: str) -> list[list[tuple[str, bool]]]:
        """Returns the pieces of a word; "$@" begins a new field for each argument after the first.

        An empty word has no pieces, one of quotes alone has an empty piece.
        """
        parts: list[list[tuple[str, bool]]] = [[]]
        for texts, splits in self._pieces(word):
            if not texts:
                continue
            parts[-1].append((texts[0], splits))
            parts += [[(text, splits)] for text in texts[1:]]
        return parts

    def _pieces(self, word: str, *, quoted: bool = False) -> Iterator[tuple[list[str], bool]]:
        """Yields the texts of each part of a word, and whether they may be split at spaces."""
        at = 0
        while at < len(word):
            char = word[at]
            if char == "'" and not quoted:
                end = closing(word, at)
                yield [word[at + 1 : end]], False
            elif char == '"':
                end = closing(word, at)
                inside = list(self._pieces(word[at + 1 : end], quoted=True))
                yield from inside or [([""], False)]
            elif char == "\\":
                end = at + 1
                yield [self._escaped(word[at : at + 2], quoted=quoted)], False
            elif char == "`":
                end = closing(word, at)
                yield [self._command(word[at + 1 : end], word[at : end + 1])], False
            elif char == "$":
                texts, end, splits = self._dollar(word, at, quoted=quoted)
                yield texts, splits
            else:
                end = at
                yield [char], False
            at = end + 1

    @staticmethod
    def _escaped(pair: str, *, quoted: bool) -> str:
        if pair == "\\\n":
            return ""
        return pair if quoted and pair[1:] not in ("$", "`", '"', "\\") else pair[1:]

    def _dollar(self, word: str, at: int, *, quoted: bool) -> tuple[list[str], int, bool]:
        """Returns what a dollar sign stands for, the position of its end, and whether it splits."""
        follows = word[at + 1 : at + 2]
        if follows == "'" and not quoted:
            end = next(m.end() for m in re.finditer(r"(?:\\.|[^'\\])*'", word[at + 2 :], re.S))
            inside = word[at + 2 : at + 1 + end]
            text = re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), inside, flags=re.S)
            return [text], at + 1 + end, False
        if word.startswith("$((", at):
            end = closing(word, at + 1)
            return [self._arithmetic(word[at + 3 : end - 1])], end, not quoted
        if follows == "(":
            end = closing(word, at + 1)
            return [self._command(word[at + 2 : end], word[at : end + 1])], end, False
        if follows == "{":
            end = closing(word, at + 1)
            return self._parameter(word[at + 2 : end]), end, not quoted
        name = _NAME.match(word, at + 1)
        if name is None:
            return ["$"], at, False
        return self._values(name[0]), name.end() - 1, not quoted

    def _values(self, name: str, index: str = "") -> list[str]:
        """Returns the texts of a variable; several only for an array's or the arguments' `@`."""
        items = self.variables.items(name)
        if name in "@*" or index in ("@", "*"):
            whole = (index or name) == "*"
            return [" ".join(items)] if whole else items
        if index:
            place = self._arithmetic(index)
            items = items[int(place) :] if place.lstrip("-").isdigit() else []
        return items[:1] or [""]

    def _parameter(self, text: str) -> list[str]:
        """Expands ${...}: an array, a default value, a part that is cut off, a length."""
        found = _PARAMETER.fullmatch(text)
        if found is None:
            self.variables.unrun.append(f"${{{text}}}")
            return [f"${{{text}}}"]
        mark, name, rest = found["mark"], found["name"], found["rest"]
        index = found["index"] or ""
        if mark == "#" and not rest:
            items = self.variables.items(name)
            return [str(len(items) if index or name in "@*" else len("".join(items)))]
        if mark == "!" and index:
            return [str(number) for number in range(len(self.variables.items(name)))]
        if mark == "!":
            name = "".join(self.variables.items(name)[:1])
        rule = _DEFAULT.match(rest)
        if rule:
            return self._default(name, index, rule[0], rest[rule.end() :])
        values = self._values(name, index)
        return [self._cut(value, rest) for value in values] if rest else values

    def _default(self, name: str, index: str, rule: str, other: str) -> list[str]:
        """Expands ${NAME:-OTHER} and its kin."""
        has = self.variables.has(name) or (":" not in rule and name in self.variables.values)
        if rule.endswith("+"):
            return [self.joined(other)] if has else [""]
        if has:
            return self._values(name, index)
        value = self.joined(other)
        if rule.endswith("="):
            self.variables.values[name] = value
        if rule.endswith("?"):
            self.variables.unset.append(name)
            return [""]
        return [value]

    def _cut(self, value: str, rest: str) -> str:
        """Applies what follows the name in ${...}: # and % cut, / replaces, : takes a part."""
        if rest[0] == ":":
            start, _, length = rest[1:].strip().partition(":")
            first = int(self._arithmetic(start) or 0)
            part = value[first:]
            return part[: int(self._arithmetic(length))] if length else part
        if rest[0] == "/":
            count = 0 if rest.startswith("//") else 1
            parts = re.match(r"//?((?:\\.|[^/\\])*)(?:/(.*))?", rest, re.S)
            old, new = parts.groups("") if parts else ("", "")
            made = self.joined(new)
            return re.sub(_glob(self.joined(old)), lambda _: made, value, count=count)
        if rest[0] in "#%":
            greedy, pattern = rest[1:2] == rest[0], self.joined(rest.lstrip(rest[0]))
            return _trimmed(value, pattern, at_start=rest[0] == "#", greedy=greedy)
        return value

    def _arithmetic(self, text: str) -> str:
        """Returns the value of an arithmetic expression; the text itself if it isn't a simple one.

        Variables without a value, or with one that is no number, count as 0, as in bash.
        """
        plain = self.joined(text).strip()
        named = re.sub(r"[A-Za-z_]\w*", lambda m: self._number(m[0]), plain)
        try:
            return str(_evaluated(ast.parse(named, mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError):
            self.variables.unrun.append(f"$(({text}))")
            return plain

    def _number(self, name: str) -> str:
        value = "".join(self.variables.items(name)[:1]).strip()
        return value if re.fullmatch(r"-?\d+", value) else "0"

    def _command(self, text: str, written: str) -> str:
        """Returns what a command substitution is, where it only takes a path apart."""
        tokens = tokens_of(text)
        name, *words = [token.text for token in tokens] or [""]
        if name in _PATHS and not any(token.is_operator for token in tokens):
            arguments = expand(words, self.variables)
            if len(arguments) == 1:
                return _PATHS[name](arguments[0])
        if (name, words) in (("pwd", []), ("", [])):
            return name and "."
        if written not in self.variables.unrun:
            self.variables.unrun.append(written)
        return written


_PATHS: dict[str, Callable[[str], str]] = {
    "dirname": lambda path: str(Path(path).parent),
    "basename": lambda path: Path(path).name,
    "realpath": os.path.normpath,
}


def _split(pieces: Sequence[tuple[str, bool]]) -> list[str]:
    """Splits pieces at the spaces of those that may be split; adjoining ones make one field."""
    found: list[str] = []
    current: str | None = None
    for text, splits in pieces:
        if not splits:
            current = (current or "") + text
            continue
        if text[:1].isspace() and current is not None:
            found.append(current)
            current = None
        for number, part in enumerate(text.split()):
            if number and current is not None:
                found.append(current)
                current = None
            current = (current or "") + part
        if text[-1:].isspace() and current is not None:
            found.append(current)
            current = None
    return found if current is None else [*found, current]


def _glob(pattern: str) -> str:
    """Returns the regular expression of a shell pattern with * and ?."""
    parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
    return "(?s:" + "".join(parts) + ")"


def _trimmed(value: str, pattern: str, *, at_start: bool, greedy: bool) -> str:
    """Cuts the shortest, or the longest, part that fits a pattern off one end of a value."""
    fits = re.compile(_glob(pattern))
    cuts = range(len(value) + 1)
    parts = [(value[:n], value[n:]) for n in cuts] if at_start else [
        (value[len(value) - n :], value[: len(value) - n]) for n in cuts
    ]  # fmt: skip
    fitting = [rest for part, rest in parts if fits.fullmatch(part)]
    return fitting[-1 if greedy else 0] if fitting else value


def _evaluated(node: ast.expr) -> int:
    """Evaluates sums and products of whole numbers; raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluated(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    raise ValueError
