"""The benchmarks by their names, and their questions as --eval-suite names them."""

from collections.abc import Sequence
from pathlib import Path

from glm3cli.config.options.run import split_suite
from glm3cli.evals.questions import Subject, read_subjects
from glm3cli.evals.suite import Suite
from glm3cli.evals.suites.ceval import CEVAL
from glm3cli.evals.suites.cmmlu import CMMLU
from glm3cli.evals.suites.mmlu import MMLU

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
