"""What the README promises: its blocks, its tables, and every command of ours in it."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.run import get_args_parser

from glm3cli.parallel import launch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
# The pages that start people, by their places.
PAGES = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "glm3cli/README.zh.md")}
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# Our program, where it is called: `glm3 X` and `glm3 COMMAND` stand for any command.
_CALL = re.compile(r"(?<![\w./-])glm3(?= [a-z])|-m glm3cli(?= [a-z])")
_VARIABLE = re.compile(r"\$\w+|\$\([^)]*\)")


@dataclass(frozen=True)
class Call:
    """A call of our program.

    Attributes:
        line: As the README has it.
        words: The command and its options.
        world_size: The ranks that torchrun starts; None without it.
    """

    line: str
    words: tuple[str, ...]
    world_size: int | None


def blocks(language: str) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return [block for name, block in _FENCED.findall(README) if name == language]


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def code(text: str = README) -> list[str]:
    """Every line of code: of all fenced blocks, and in backticks."""
    fenced = [block.replace("\\\n", " ") for _, block in _FENCED.findall(text)]
    inline = re.findall(r"`([^`]+)`", _FENCED.sub("", text))
    return [line for block in fenced for line in block.splitlines()] + [
        line.replace("\n", " ") for line in inline
    ]


def num_calls(text: str = README) -> int:
    """How often our program is called, counted without looking into the lines."""
    return sum(len(_CALL.findall(line)) for line in code(text))


def calls(text: str = README) -> list[Call]:
    """Every call of our program, also behind others and under torchrun or srun.

    Raises:
        ValueError: A line that calls it can't be read.
    """
    lines = [line for line in code(text) if _CALL.search(line)]
    found = [_call(words) for line in lines for words in _commands(line)]
    return [call for call in found if call is not None]


def _commands(line: str) -> list[list[str]]:
    """The commands of a shell line, as words."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split, lexer.commenters = True, "#"
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;"):
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def _call(words: list[str]) -> Call | None:
    line = shlex.join(words)
    if "torchrun" in words:
        # torch's own parser refuses what torchrun would refuse.
        told = [_VARIABLE.sub("2", word) for word in words[words.index("torchrun") + 1 :]]
        launch = get_args_parser().parse_args(told)
        if not (launch.module and launch.training_script == "glm3cli"):
            return None
        ranks = int(launch.nnodes.split(":")[-1]) * int(launch.nproc_per_node)
        return Call(line, tuple(launch.training_script_args), ranks)
    for start in (["glm3"], ["-m", "glm3cli"]):
        for place in range(len(words)):
            if words[place : place + len(start)] == start:
                return Call(line, tuple(words[place + len(start) :]), None)
    return None


def launch_as_markdown() -> str:
    """The shell lines at the head of parallel/launch.py as a block of a page."""
    lines = (launch.__doc__ or "").splitlines()
    code = [line.removeprefix("    ") for line in lines if line.startswith("    ")]
    return "```bash\n" + "\n".join(code) + "\n```\n"
