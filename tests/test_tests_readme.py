"""The page about the tests names files and options that exist, and leaves no benchmark out."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "tests/README.md").read_text("utf-8")
GUARANTEES = "What is guaranteed, and which test proves it"


def rows(heading: str) -> list[list[str]]:
    """The cells of all tables under a heading, without their heads."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.M)
    lines = [line for table in tables for line in table.splitlines()[2:]]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def test_every_file_named_exists():
    places = [word for word in named(PAGE) if re.fullmatch(r"(\.ci|tests)/[\w./]+", word)]
    assert len(places) > 40
    assert [place for place in places if not (ROOT / place).exists()] == []
    for names, _ in rows("What the tests share"):
        for name in named(names):
            assert (ROOT / "tests/support" / name).exists(), name


def test_every_guarantee_names_its_tolerance_and_a_test():
    guarantees = rows(GUARANTEES)
    assert len(guarantees) > 20
    for claim, tolerance, tests in guarantees:
        assert claim
        assert tolerance
        assert any(re.fullmatch(r"tests/(\w+/)*test_\w+\.py", name) for name in named(tests)), claim
        for name in named(tests):
            assert (ROOT / name).is_file(), f"{claim}: {name}"


def test_every_benchmark_is_listed_with_its_command():
    files = {file.stem: command for file, _, command in benchmarks()}
    there = {path.stem for path in (ROOT / "tests/benchmarks").glob("*.py")} - {"__init__"}
    assert files.keys() == there
    for name, command in files.items():
        assert command.startswith(f"python -m tests.benchmarks.{name}"), command
        text = (ROOT / f"tests/benchmarks/{name}.py").read_text("utf-8")
        for option in re.findall(r"--[\w-]+", command):
            assert f'"{option}"' in text, f"{name}: {option}"


def benchmarks() -> list[tuple[Path, str, str]]:
    """The file, the subject and the command of each benchmark on the page."""
    return [
        (Path(*named(file)), subject, *named(command))
        for file, subject, command in rows("Benchmarks")
    ]


def test_the_markers_are_those_of_pytest():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]
    known = [line.split(":")[0] for line in options["ini_options"]["markers"]]
    told = [named(row[0]) for row in rows("Running them")]
    assert [word for words in told for word in words if word in known] == known


def test_every_folder_of_tests_is_explained():
    folders = {named(row[0])[0] for row in rows("What is where")}
    there = {path for path in (ROOT / "tests").iterdir() if any(path.glob("*.py"))}
    assert folders == {path.relative_to(ROOT).as_posix() for path in there}
