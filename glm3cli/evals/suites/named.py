"""The benchmarks by their names: the questions of --eval-suite, and those of an earlier result."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm3cli.config.options.run import split_suite
from glm3cli.errors import DataError
from glm3cli.evals.questions import Subject, read_subjects
from glm3cli.evals.suite import Question, Suite
from glm3cli.evals.suites.ceval import CEVAL
from glm3cli.evals.suites.cmmlu import CMMLU
from glm3cli.evals.suites.mmlu import MMLU
from glm3cli.evals.suites.own import by_subject, read_rows

_SUITES = {suite.name: suite for suite in (MMLU, CEVAL, CMMLU)}


def read_suites(named: Sequence[str]) -> list[tuple[Suite, list[Subject]]]:
    """Reads the benchmarks of --eval-suite, with five shots.

    Args:
        named: The values of the option, NAME=DIR or NAME=DIR:LIMIT.

    Raises:
        ConfigError: A dev file has too few rows.
        DataError: A folder or a file is missing or wrong.
    """
    found = []
    for one in named:
        name, folder, limit = split_suite(one)
        suite = _SUITES[name]
        found.append((suite, read_subjects(suite, Path(folder), limit=limit)))
    return found


def questions_of(result: Mapping[str, Any]) -> dict[tuple[str, int], Question]:
    """Reads the questions of a result once more, from where its settings say that they lay.

    Args:
        result: A results.json of one of the benchmarks, or of questions of one's own.

    Returns:
        The questions by subject and index.

    Raises:
        DataError: The files are gone or damaged, or have other questions by now.
    """
    settings = result["settings"]
    if "file" in settings:
        groups = by_subject(read_rows(Path(settings["file"])))
        found = [one for group in groups.values() for one in group]
    elif "data_dir" in settings and (suite := _SUITES.get(result["benchmark"])):
        subjects = read_subjects(suite, Path(settings["data_dir"]), num_shots=0)
        found = [one for subject in subjects for one in subject.questions]
    else:
        raise DataError("the result doesn't say where its questions lay", "run the eval again")
    questions = {(one.subject, one.index): one for one in found}
    for one in result["questions"]:
        question = questions.get((one["subject"], one["index"]))
        if question is None or question.answer != one["answer"]:
            raise DataError(
                f"the files have another question {one['subject']} {one['index']} by now",
                "run the eval again",
            )
    return questions
