"""Groups the words of a bash script into commands, conditions, loops and functions."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from glm3cli.config.scripts.words import Token, tokens_of

_SEPARATORS = {"\n", ";", "&&", "||", "&", "|", "|&"}
# The words that end a part of a condition, a loop or a function, at the place of a command.
_ENDS = {"then", "elif", "else", "fi", "do", "done", "esac", "}"}


@dataclass(frozen=True)
class Simple:
    """A command with its arguments, or assignments.

    Attributes:
        line: The number of its line, from 1.
        words: Its words, not yet expanded.
    """

    line: int
    words: tuple[str, ...]


@dataclass(frozen=True)
class Condition:
    """An `if` or a `case`.

    Attributes:
        line: The number of its line, from 1.
        tests: The commands whose results decide.
        branches: The commands of each branch.
    """

    line: int
    tests: "tuple[Node, ...]"
    branches: "tuple[tuple[Node, ...], ...]"


@dataclass(frozen=True)
class Loop:
    """A `for`, `while` or `until`.

    Attributes:
        line: The number of its line, from 1.
        name: The variable that a `for` counts with; "" for none.
        items: The words that it takes, not yet expanded.
        body: The commands inside.
    """

    line: int
    name: str
    items: tuple[str, ...]
    body: "tuple[Node, ...]"


@dataclass(frozen=True)
class Function:
    """The definition of a function.

    Attributes:
        line: The number of its line, from 1.
        name: Its name.
        body: The commands inside.
    """

    line: int
    name: str
    body: "tuple[Node, ...]"


Node = Simple | Condition | Loop | Function


def parse(text: str) -> tuple[Node, ...]:
    """Returns the commands of a script in their order; what a subshell has stands among them.

    Raises:
        ScriptError: A quote or a bracket isn't closed.
    """
    return _Parser(tokens_of(text)).nodes(frozenset())


@dataclass
class _Parser:
    """Reads nodes from tokens, one after the other."""

    tokens: list[Token]
    at: int = 0
    _found: list[Node] = field(default_factory=list)

    def nodes(self, ends: Iterable[str]) -> tuple[Node, ...]:
        """Reads commands up to one of the words `ends`, which isn't taken, or to the end."""
        found: list[Node] = []
        stops, after = frozenset(ends), ""
        while (token := self._peek()) is not None:
            if token.is_operator:
                if token.text in stops:
                    break
                self.at += 1  # a separator, or a bracket of a subshell
                after = token.text
            elif token.text in stops:
                break
            elif token.text in _ENDS or token.text in ("{", "!", "time"):
                self.at += 1
            else:
                node = self._node(token)
                found += [] if after == "||" else [node]  # that is for when something fails
                after = ""
        return tuple(found)

    def _node(self, token: Token) -> Node:
        if token.text == "if":
            return self._if(token.line)
        if token.text == "case":
            return self._case(token.line)
        if token.text in ("for", "select", "while", "until"):
            return self._loop(token)
        if token.text == "function" or (self._ahead(1) == "(" and self._ahead(2) == ")"):
            return self._function(token)
        return self._simple(token.line)

    def _peek(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _ahead(self, count: int) -> str:
        """Returns the operator that stands `count` tokens ahead; "" if none does."""
        place = self.at + count
        token = self.tokens[place] if place < len(self.tokens) else None
        return token.text if token is not None and token.is_operator else ""

    def _take(self, word: str) -> bool:
        """Takes a word if it comes next; returns whether it did."""
        token = self._peek()
        if token is None or token.text != word:
            return False
        self.at += 1
        return True

    def _if(self, line: int) -> Condition:
        branches: list[tuple[Node, ...]] = []
        self.at += 1
        tests = list(self.nodes(("then",)))
        while self._take("then"):
            branches.append(self.nodes(("elif", "else", "fi")))
            if self._take("elif"):
                tests += self.nodes(("then",))
        if self._take("else"):
            branches.append(self.nodes(("fi",)))
        self._take("fi")
        return Condition(line, tuple(tests), tuple(branches))

    def _case(self, line: int) -> Condition:
        branches: list[tuple[Node, ...]] = []
        while (token := self._peek()) is not None and token.text != "in":
            self.at += 1
        self._take("in")
        while (token := self._peek()) is not None and token.text != "esac":
            while (token := self._peek()) is not None and token.text not in (")", "esac"):
                self.at += 1  # the pattern
            if self._take(")"):
                branches.append(self.nodes((";;", ";&", ";;&", "esac")))
                self.at += (token := self._peek()) is not None and token.text != "esac"
        self._take("esac")
        return Condition(line, (), tuple(branches))

    def _loop(self, token: Token) -> Loop:
        self.at += 1
        name, items = "", []
        while (word := self._peek()) is not None and word.text != "do":
            self.at += 1
            if token.text == "for" and not word.is_operator:
                items.append(word.text)
        self._take("do")
        body = self.nodes(("done",))
        self._take("done")
        if len(items) > 1 and items[1] == "in":
            name, items = items[0], items[2:]
        else:
            items = []
        return Loop(token.line, name, tuple(items), body)

    def _function(self, token: Token) -> Function:
        if self._take("function"):
            token = self.tokens[self.at]
        self.at += 1
        while self._take("(") or self._take(")") or self._take("\n"):
            pass
        self._take("{")
        body = self.nodes(("}",))
        self._take("}")
        return Function(token.line, token.text, body)

    def _simple(self, line: int) -> Simple:
        words: list[str] = []
        while (token := self._peek()) is not None:
            in_test = bool(words) and words[0] == "[[" and words[-1] != "]]"
            if token.is_operator and not (in_test and token.text != "\n"):
                break
            words.append(token.text)
            self.at += 1
        return Simple(line, tuple(words))
