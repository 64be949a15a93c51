"""`read_script`: which programs a bash script would start, and with which arguments.

The script is read, never executed. Assignments, arrays, functions, and `source` of files that are
there are followed. Of a condition the first branch is followed, of a loop one round; what isn't
known without running something stays as it is written. Each of these is noted.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glm3cli.config.scripts.expansion import Variables, expand, expand_one
from glm3cli.config.scripts.grammar import Condition, Function, Loop, Node, Simple, parse
from glm3cli.config.scripts.words import ScriptError, tokens_of
from glm3cli.errors import DataError

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(?:\[([^]]*)\])?(\+?)=(.*)", re.S | re.ASCII)
_DECLARING = {"export", "declare", "typeset", "local", "readonly"}
_DEPTH = 20  # of functions and sourced files inside each other


@dataclass(frozen=True)
class Invocation:
    """A program that a script starts.

    Attributes:
        line: The number of the line in its file, from 1.
        words: The name of the program and its arguments.
    """

    line: int
    words: tuple[str, ...]


@dataclass
class Script:
    """What a script does.

    Attributes:
        invocations: The programs that it starts, in their order.
        exports: The variables that it exports, with their values.
        notes: Sentences about what could not be told without running it.
    """

    invocations: list[Invocation] = field(default_factory=list)
    exports: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_script(
    path: Path, arguments: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Script:
    """Reads a bash script without executing any of it.

    Args:
        path: The script.
        arguments: The arguments that it would be called with.
        variables: Values that replace those that the script gives to variables of these names.

    Raises:
        DataError: The script can't be read, or is no bash.
    """
    given = dict(variables or {})
    reader = _Reader(Variables({**given}, list(arguments), str(path)), path.parent, given)
    try:
        reader.run(parse(_text(path)))
    except ScriptError as error:
        raise DataError(f"{path} is no bash script: {error}", "check it with bash -n") from None
    except RecursionError:
        raise DataError(f"{path} has brackets too deep inside each other", "simplify it") from None
    return reader.finished()


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}", "give a shell script") from None


@dataclass
class _Reader:
    """Follows the commands of a script."""

    variables: Variables
    folder: Path
    given: Mapping[str, str]
    script: Script = field(default_factory=Script)
    functions: dict[str, tuple[Node, ...]] = field(default_factory=dict)
    depth: int = 0

    def run(self, nodes: Sequence[Node]) -> None:
        """Follows commands one after the other."""
        for node in nodes:
            if isinstance(node, Simple):
                self._simple(node)
            elif isinstance(node, Function):
                self.functions[node.name] = node.body
            elif isinstance(node, Condition):
                self._condition(node)
            else:
                self._loop(node)

    def finished(self) -> Script:
        """Returns what was found, with notes about what has no value."""
        unset = [name for name in dict.fromkeys(self.variables.unset) if not name.isdigit()]
        if unset:
            self._note(
                f"the script gives no value to {', '.join(unset)}: give one with "
                f"--set {unset[0]}=VALUE"
            )
        if any(name.isdigit() for name in self.variables.unset):
            self._note("the script takes arguments: give them behind its name")
        for written in dict.fromkeys(self.variables.unrun):
            self._note(f"{written} is not run and stays as it is")
        return self.script

    def _note(self, sentence: str) -> None:
        if sentence not in self.script.notes:
            self.script.notes.append(sentence)

    def _condition(self, node: Condition) -> None:
        self._note(
            f"line {node.line}: a condition isn't decided; of its branches the first is followed"
        )
        self.run([n for n in node.tests if not isinstance(n, Simple) or "=" in n.words[0]])
        if node.branches:
            self.run(node.branches[0])

    def _loop(self, node: Loop) -> None:
        self._note(f"line {node.line}: of a loop one round is followed, the first")
        if node.name:
            items = expand(node.items, self.variables)
            self.variables.values[node.name] = items[0] if items else ""
        self.run(node.body)

    def _simple(self, node: Simple) -> None:
        """Follows assignments, or a command."""
        words = list(node.words)
        while words and (found := _ASSIGNMENT.fullmatch(words[0])):
            self._assign(*found.groups(""))
            words.pop(0)
        if not words:
            return
        if words[0] in _DECLARING:
            self._declare(words)
            return
        fields = expand(words, self.variables)
        if not fields:
            return
        if fields[0] in (".", "source") and len(fields) > 1:
            self._source(Path(fields[1]), fields[2:])
        elif fields[0] in self.functions:
            self._call(self.functions[fields[0]], fields[1:])
        elif fields[0] == "shift":
            del self.variables.arguments[: int(fields[1]) if fields[1:] else 1]
        elif fields[0] == "set" and "--" in fields:
            self.variables.arguments = fields[fields.index("--") + 1 :]
        else:
            self.script.invocations.append(Invocation(node.line, tuple(fields)))

    def _declare(self, words: Sequence[str]) -> None:
        for word in words[1:]:
            found = _ASSIGNMENT.fullmatch(word)
            if found:
                self._assign(*found.groups(""))
            name = found[1] if found else word
            value = self.variables.values.get(name)
            if words[0] == "export" and isinstance(value, str):
                self.script.exports[name] = value

    def _assign(self, name: str, index: str, plus: str, text: str) -> None:
        """Gives a variable a value, unless the user has given it one."""
        if name in self.given:
            return
        values = self.variables.values
        if text.startswith("(") and text.endswith(")"):
            items = expand(_inside(text[1:-1]), self.variables)
            before = values.get(name, []) if plus else []
            values[name] = [*([before] if isinstance(before, str) else before), *items]
            return
        value = expand_one(text, self.variables)
        before = values.get(name, "")
        if index or isinstance(before, list):
            items = list(before) if isinstance(before, list) else [before]
            place = int(index) if index.isdigit() else 0
            items += [""] * (place + 1 - len(items))
            items[place] = items[place] + value if plus else value
            values[name] = items
        else:
            values[name] = before + value if plus else value

    def _source(self, path: Path, arguments: Sequence[str]) -> None:
        """Follows a sourced file if it is there; those of CANN only set up its environment."""
        place = path if path.is_absolute() else self.folder / path
        place = place if place.is_file() else path
        if path.name in ("set_env.sh", "setvars.sh", "activate"):
            return
        if not place.is_file() or self.depth >= _DEPTH:
            self._note(f"{path}, which the script sources, isn't there: what it sets is missing")
            return
        self._inside_of(parse(_text(place)), arguments or self.variables.arguments)

    def _call(self, body: Sequence[Node], arguments: Sequence[str]) -> None:
        if self.depth < _DEPTH:
            self._inside_of(body, arguments)

    def _inside_of(self, body: Sequence[Node], arguments: Sequence[str]) -> None:
        """Follows a function or a sourced file, which has arguments of its own."""
        outer, self.variables.arguments = self.variables.arguments, list(arguments)
        self.depth += 1
        self.run(body)
        self.depth -= 1
        self.variables.arguments = outer


def _inside(text: str) -> list[str]:
    """Returns the words between the brackets of an array."""
    return [token.text for token in tokens_of(text) if not token.is_operator]
