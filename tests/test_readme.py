"""The README promises commands, options, and tests: they must exist."""

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from glm3cli import errors
from glm3cli.cli.app import app
from glm3cli.config.convert import ToHfConfig, ToMegatronConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """The contents of the fenced blocks of a language."""
    fenced = README.split("\n```")[1::2]
    return [block.split("\n", 1)[1] for block in fenced if block.split("\n", 1)[0] == language]


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def command_lines() -> list[str]:
    """Everything in the README that one may type for our program."""
    lines = []
    for block in blocks("bash"):
        joined = block.replace("\\\n", " ")
        commands = re.split(r"\n|&&", joined)
        lines += [line.split(" #")[0].strip() for line in commands]
    lines += re.findall(r"`((?:glm3|torchrun) [^`]+)`", README)
    ours = [line for line in lines if re.match(r"glm3 |torchrun .*-m glm3cli", line)]
    # `glm3 X`, `glm3 COMMAND --help`, and `... -m glm3cli X` stand for any command.
    return [line for line in dict.fromkeys(ours) if not re.search(r" (X|COMMAND)\b", line)]


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words start with, and the words after it."""
    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]  # type: ignore[attr-defined]
    return command, words


def test_commands_of_all_kinds_are_found():
    lines = command_lines()
    assert len(lines) > 12
    assert any(line.startswith("torchrun") for line in lines)
    assert "glm3 demo" in lines


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_names_a_command_and_options_that_exist(line):
    words = shlex.split(re.sub(r"^torchrun .*-m glm3cli", "glm3", line))[1:]
    command, rest = find_command(words)
    assert not hasattr(command, "commands"), f"{words[0]} is not a command"
    known = {
        spelling
        for parameter in command.params
        for spelling in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help"}
    options = {word.split("=")[0] for word in rest if word.startswith("--")}
    assert options <= known


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_can_be_parsed(line):
    words = shlex.split(re.sub(r"^torchrun .*-m glm3cli", "glm3", line))[1:]
    command, rest = find_command(words)
    # Parses only: neither a callback that reads a file nor the command runs.
    context = command.make_context("glm3", [*rest], resilient_parsing=True)
    assert context.args == []


def test_every_command_of_the_table_exists():
    named = [row[0].strip("`") for row in table("The commands")]
    group = typer.main.get_command(app)
    assert sorted(named) == sorted(group.commands)  # type: ignore[attr-defined]


def test_every_option_named_in_the_text_exists():
    group = typer.main.get_command(app)
    commands: list[Any] = [group]
    known = {"--help"}
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    torchruns = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
    torchruns |= {"--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--max-restarts"}
    slurms = {"--nodes", "--ntasks-per-node", "--time", "--signal"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= known | torchruns | slurms


def test_the_two_commands_that_start_everything_are_there():
    demo, tests = blocks("bash")[:2]
    assert demo.strip().endswith("pip install -e . && glm3 demo")
    assert tests.strip() == "pip install -e '.[test]' && pytest"
    assert all(len(block.strip().splitlines()) == 1 for block in (demo, tests))


def test_every_claim_is_proved_by_a_test_that_exists():
    rows = table("What is guaranteed, and which test proves it")
    assert len(rows) >= 6
    for claim, _, proofs in rows:
        named = re.findall(r"`([^`]+)`", proofs)
        assert named, claim
        for pattern in named:
            assert list(ROOT.glob(pattern)), f"{claim}: {pattern}"


def test_every_place_named_exists():
    (tree,) = [block for block in blocks("") if block.startswith("glm3cli/")]
    folders = re.findall(r"(?:^| )([a-z]+)/ ", tree)
    assert set(folders) == {
        path.name for path in (ROOT / "glm3cli").iterdir() if (path / "__init__.py").is_file()
    }
    for name in re.findall(r"`([a-z]+/[a-z_]+\.py)`", README):
        assert (ROOT / "glm3cli" / name).is_file(), name
    assert (ROOT / ".ci/run").is_file()


def test_every_layout_can_be_read_and_written_as_told():
    written = {
        layout
        for config, field in ((ToHfConfig, "layout"), (ToMegatronConfig, "format"))
        for layout in get_args(config.model_fields[field].annotation)
    }
    rows = {row[0].strip("`"): row[2:] for row in table("Layouts")}
    assert {name for name, (_, how) in rows.items() if how != "no"} == written
    assert all(how == "yes" for how, _ in rows.values())


def test_the_exit_codes_are_those_of_the_errors():
    text = README.split("## Exit codes", 1)[1].split("\n## ", 1)[0]
    told = {int(code) for code in re.findall(r"(?:^|, )(\d+) [a-z]", text, re.M)}
    ours = {value.exit_code for value in vars(errors).values() if hasattr(value, "exit_code")}
    assert told == {0, 1} | ours
