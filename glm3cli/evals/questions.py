"""Finds and reads the CSV files of a benchmark; every cell stays the string that is in the file.

Imports no torch, so that errors in the files are reported before the model is loaded.
"""

import csv
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from glm3cli.errors import ConfigError, DataError
from glm3cli.evals.suite import LETTERS, Question, Suite

_SHOTS = "dev"  # the split that shots come from, in every suite
_FEWEST_COLUMNS = 4  # a question, two options, and the answer


@dataclass(frozen=True)
class Subject:
    """The questions of one subject of a benchmark.

    Attributes:
        name: The subject, as its files are named.
        questions: The questions to ask, in the order of the file.
        shots: The solved questions of the dev split that stand in front of each question.
    """

    name: str
    questions: tuple[Question, ...]
    shots: tuple[Question, ...]


def read_subjects(
    suite: Suite,
    data_dir: Path,
    names: Sequence[str] = (),
    num_shots: int = 5,
    limit: int | None = None,
) -> list[Subject]:
    """Reads the subjects of a benchmark, in alphabetical order.

    Args:
        suite: The benchmark.
        data_dir: The folder that has a folder per split, itself or in its folder `data`.
        names: The subjects to read, as their files are named; all subjects if empty.
        num_shots: Number of solved questions per subject: the first ones of its dev file.
        limit: Most questions to read of each subject; None for all.

    Raises:
        ConfigError: A name is not among the files, or a dev file has fewer than `num_shots` rows.
        DataError: The folder or a split's files are missing, or a row is damaged.
    """
    root = _root(data_dir, suite.split)
    files = _files(root, suite.split)
    _check_known(names, files)
    shot_files = _files(root, _SHOTS) if num_shots else {}
    subjects = []
    for name in sorted(names or files):
        questions = tuple(_rows(files[name], name, suite))
        if not questions:
            raise DataError(f"{files[name]} has no questions", "fetch the file again")
        shots = _first_shots(shot_files, root, name, suite, num_shots)
        subjects.append(Subject(name, questions[:limit], shots))
    return subjects


def _root(data_dir: Path, split: str) -> Path:
    """Returns the folder that has the folder `split`: `data_dir` or `data` in it."""
    if not data_dir.is_dir():
        raise DataError(
            f"--data-dir {data_dir} does not exist",
            f"give the folder that has the folders {_SHOTS} and {split}",
        )
    for root in (data_dir, data_dir / "data"):
        if (root / split).is_dir():
            return root
    if table := next(data_dir.rglob("*.parquet"), None):
        raise DataError(
            f"--data-dir {data_dir} has parquet files such as {table.relative_to(data_dir)}",
            f"give the folders {_SHOTS} and {split} with a CSV file per subject, or ask the "
            "questions of one parquet file by glm3 eval custom",
        )
    raise DataError(
        f"--data-dir {data_dir} has no folder {split}",
        f"give the folder that has the folders {_SHOTS} and {split} with a CSV file per subject",
    )


def _files(root: Path, split: str) -> dict[str, Path]:
    """Returns a split's files by subject: `law_test.csv` and `law.csv` both belong to `law`."""
    paths = sorted((root / split).glob("[!.]*.csv"))
    if not paths:
        raise DataError(
            f"{root / split} has no CSV files", "fetch the benchmark's CSV files into it"
        )
    return {path.stem.removesuffix(f"_{split}"): path for path in paths}


def _check_known(names: Sequence[str], files: dict[str, Path]) -> None:
    problems, hint = [], ""
    for name in names:
        if name not in files:
            near = difflib.get_close_matches(name, files, n=1)
            problems.append(
                f"no subject {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
            )
            hint = f"there are {', '.join(files)}"
    if problems:
        raise ConfigError(f"--subjects: {'; '.join(problems)}", hint)


def _first_shots(
    files: dict[str, Path], root: Path, name: str, suite: Suite, num_shots: int
) -> tuple[Question, ...]:
    """Returns the first `num_shots` questions of the subject `name` in the dev split."""
    if not num_shots:
        return ()
    if name not in files:
        raise DataError(
            f"{root / _SHOTS} has no file for the subject {name}", "fetch it, or use --shots 0"
        )
    shots = tuple(_rows(files[name], name, suite))
    if len(shots) < num_shots:
        raise ConfigError(
            f"--shots {num_shots}, but {files[name]} has {len(shots)} rows",
            f"use --shots {len(shots)} or fewer",
        )
    return shots[:num_shots]


def _rows(path: Path, subject: str, suite: Suite) -> Iterator[Question]:
    """Yields the questions of one CSV file, which all have as many options."""
    rows = _cells(path)
    places: Sequence[int] = ()
    width = 0
    if suite.columns is not None:
        line, header = next(rows, (1, []))
        places, width = _places(header, suite.columns, f"{path}:{line}"), len(header)
    for index, (line, cells) in enumerate(rows):
        if not width:
            width = _width(cells, f"{path}:{line}")
            places = range(width)
        if len(cells) != width:
            raise DataError(
                f"{path}:{line} has {len(cells)} columns instead of {width}",
                "put quotes around cells that have commas in them",
            )
        text, *choices, answer = (cells[place] for place in places)
        letter = answer.strip()
        if letter not in LETTERS[: len(choices)]:
            raise DataError(
                f"{path}:{line} has the answer {answer!r}",
                f"it must be one of {', '.join(LETTERS[: len(choices)])}",
            )
        yield Question(subject, index, text, tuple(choices), letter)


def _width(cells: Sequence[str], where: str) -> int:
    """Returns the number of columns of a file without a header line, by its first row.

    Raises:
        DataError: There can't be a question with options and an answer in it.
    """
    most = len(LETTERS) + 2
    if not _FEWEST_COLUMNS <= len(cells) <= most:
        raise DataError(
            f"{where} has {len(cells)} columns, and must have {_FEWEST_COLUMNS} to {most}",
            "a row has a question, its options, and the letter of the right one",
        )
    return len(cells)


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows of a CSV file, each with the number of the line in which it begins."""
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}:{line} is not CSV in UTF-8: {error}", "fetch the file again"
        ) from None


def _places(header: list[str], columns: Sequence[str], where: str) -> list[int]:
    """Returns the position of each of `columns` in the header line of a file.

    Columns of further options, named by the letters that come next, stand before the last one.

    Raises:
        DataError: A column is missing.
    """
    names = [name.strip().lower() for name in header]
    missing = [name for name in columns if name.lower() not in names]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(missing)}",
            f"the first line must name the columns {', '.join(columns)}",
        )
    further = takewhile(lambda letter: letter.lower() in names, LETTERS[len(columns) - 2 :])
    return [names.index(name.lower()) for name in (*columns[:-1], *further, columns[-1])]
