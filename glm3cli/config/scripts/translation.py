"""`Translation`: what a program's flags become, and `Flags`, from which each is taken once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from glm3cli.config.scripts.flags import NEEDLESS, refusal
from glm3cli.config.scripts.shell import Invocation

Outcome = Literal["taken over", "needless here", "not supported"]


@dataclass(frozen=True)
class Fate:
    """What becomes of a flag.

    Attributes:
        flag: The flag, with its dashes.
        value: Its value in the script, "" for none.
        outcome: Whether glm3 takes it over.
        text: The option that it became, why it is needless, or what to do instead.
    """

    flag: str
    value: str
    outcome: Outcome
    text: str


@dataclass
class Translation:
    """The command of glm3 that a program of a script amounts to.

    Attributes:
        program: The name of the script's program.
        line: The number of its line in the script, from 1.
        command: The words of the command, without `glm3`.
        options: The options by the names that a --config file has.
        arguments: Arguments that no --config file can hold; then the command is a line, no file.
        nodes: The number of machines.
        fates: What became of each flag, in the script's order.
        notes: Sentences about what else the user should know.
    """

    program: str
    line: int
    command: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    nodes: int = 1
    fates: list[Fate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Flags:
    """The flags of a program, which note what becomes of them."""

    def __init__(self, words: Sequence[str]) -> None:
        """Reads flags and their values; of a flag that comes twice the last one counts.

        Args:
            words: The arguments of a program.
        """
        self._given: dict[str, list[str]] = {}
        self._fates: dict[str, Fate] = {}
        self.strays: list[str] = []
        name = ""
        for word in words:
            if word.startswith("--") and len(word) > 2:
                name, _, value = word.partition("=")
                self._given.pop(name, None)
                self._given[name] = [value] if "=" in word else []
            elif name:
                self._given[name].append(word)
            else:
                self.strays.append(word)

    def __contains__(self, flag: str) -> bool:
        return flag in self._given

    def values(self, flag: str) -> list[str]:
        """Returns the values of a flag; none if it isn't given."""
        return self._given.get(flag, [])

    def value(self, flag: str, default: str = "") -> str:
        """Returns the values of a flag as one text."""
        return " ".join(self.values(flag)) or default

    def whole(self, flag: str, default: int = 0) -> int:
        """Returns the value of a flag as a whole number, or the default if it is none."""
        text = self.value(flag)
        return int(text) if text.lstrip("+").isdigit() else default

    def note(self, flag: str, outcome: Outcome, text: str) -> None:
        """Notes what becomes of a flag, if it is given."""
        if flag in self and flag not in self._fates:
            self._fates[flag] = Fate(flag, self.value(flag), outcome, text)

    def take(self, flag: str, text: str) -> None:
        """Notes that a flag was taken over, if it is given, and as what."""
        self.note(flag, "taken over", text)

    def take_all(
        self, table: Mapping[str, tuple[str, Callable[[Sequence[str]], Any]]]
    ) -> dict[str, Any]:
        """Takes the flags of a table over, and returns them as options."""
        options: dict[str, Any] = {}
        for flag, values in self._given.items():
            if flag not in table or flag in self._fates:
                continue
            option, convert = table[flag]
            try:
                options[option] = convert(values)
            except (ValueError, IndexError):
                self.note(
                    flag, "not supported", f"its value is none that --{_dashed(option)} takes"
                )
            else:
                self.take(flag, option)
        return options

    def fates(self) -> list[Fate]:
        """Returns what became of every flag; of those that nothing took, what the tables say."""
        for flag in self._given:
            if flag in NEEDLESS:
                self.note(flag, "needless here", NEEDLESS[flag])
            else:
                self.note(flag, "not supported", refusal(flag))
        strays = [Fate(word, "", "not supported", "it belongs to no flag") for word in self.strays]
        return [*(self._fates[flag] for flag in self._given), *strays]


@dataclass(frozen=True)
class Call:
    """A call of one of the programs that glm3 replaces.

    Attributes:
        program: Its name, such as pretrain_gpt.py.
        line: The number of its line in the script, from 1.
        flags: Its flags.
        ranks: The number of ranks on a machine; None if nothing says it.
        nodes: The number of machines.
    """

    program: str
    line: int
    flags: Flags
    ranks: int | None
    nodes: int

    @classmethod
    def of(cls, invocation: Invocation) -> "Call | None":
        """Reads a command line; returns None if it starts no program in Python."""
        words = invocation.words
        place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if place is None:
            return None
        launch = Flags(
            [word.replace("_", "-") if "-" in word[:2] else word for word in words[:place]]
        )
        ranks = launch.value("--nproc-per-node") or launch.value("--local-worker-num")
        return cls(
            program=words[place].rpartition("/")[2],
            line=invocation.line,
            flags=Flags(words[place + 1 :]),
            ranks=int(ranks) if ranks.isdigit() else None,
            nodes=launch.whole("--nnodes", 1),
        )

    def translation(self, command: Sequence[str], options: Mapping[str, Any]) -> Translation:
        """Begins the translation of the call into a command with options."""
        return Translation(self.program, self.line, list(command), dict(options), nodes=self.nodes)

    @property
    def dtype(self) -> str:
        """The type to compute in, by --fp16 and --bf16."""
        for flag, name in (("--fp16", "fp16"), ("--bf16", "bf16")):
            if flag in self.flags:
                self.flags.take(flag, f"dtype {name}")
                return name
        return "fp32"


def _dashed(option: str) -> str:
    return option.replace("_", "-")
