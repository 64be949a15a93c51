"""Counts and averages against numbers worked out by hand."""

import math

import pytest

from glm3cli.evals.results import (
    QuestionResult,
    mean_accuracy,
    tally,
    tally_categories,
    tally_subjects,
)
from glm3cli.evals.suites.ceval import CEVAL
from glm3cli.evals.suites.cmmlu import CMMLU
from glm3cli.evals.suites.mmlu import MMLU


def _questions(subject: str, choices: str) -> list[QuestionResult]:
    """Questions whose right answer is A."""
    return [
        QuestionResult(subject=subject, index=i, scores=[], choice=c, answer="A", shots=0)
        for i, c in enumerate(choices)
    ]


def test_standard_error_of_a_share() -> None:
    counts = tally([True, False, False, False])
    assert (counts["correct"], counts["total"], counts["accuracy"]) == (1, 4, 0.25)
    assert counts["stderr"] == pytest.approx(math.sqrt(3) / 8)  # sqrt(1/4 * 3/4 / 4)
    assert tally([True])["stderr"] == 0.0


def test_subjects_and_categories() -> None:
    subjects = tally_subjects(
        _questions("anatomy", "AB")  # 1 of 2
        + _questions("astronomy", "AAAB")  # 3 of 4
        + _questions("virology", "BBBBBBAA")  # 2 of 8
        + _questions("my_own", "B")  # 0 of 1
    )
    assert {name: one["correct"] for name, one in subjects.items()} == {
        "anatomy": 1,
        "astronomy": 3,
        "virology": 2,
        "my_own": 0,
    }
    assert mean_accuracy(subjects.values()) == (0.5 + 0.75 + 0.25 + 0.0) / 4
    categories = tally_categories(MMLU, subjects)
    assert list(categories) == ["STEM", "other"]
    other = categories["other"]
    assert (other["correct"], other["total"]) == (3, 11)
    assert other["accuracy"] == 3 / 11
    assert other["macro"] == (0.5 + 0.25 + 0.0) / 3
    assert other["stderr"] == pytest.approx(math.sqrt(3 * 8 / 11**3))


def test_a_subject_may_count_in_two_categories() -> None:
    subjects = tally_subjects(_questions("chinese_history", "AB"))
    assert list(tally_categories(CMMLU, subjects)) == ["Humanities", "China specific"]


def test_tables_hold_every_subject_once() -> None:
    sizes = {name: len(subjects) for name, subjects in MMLU.categories.items()}
    assert sizes == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}
    sizes = {name: len(subjects) for name, subjects in CEVAL.categories.items()}
    assert sizes == {"STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11}
    assert len(CEVAL.titles) == 52
    sizes = {name: len(subjects) for name, subjects in CMMLU.categories.items()}
    assert sum(sizes.values()) - sizes["China specific"] == len(CMMLU.titles) == 67
    for suite in (MMLU, CEVAL):
        names = [name for subjects in suite.categories.values() for name in subjects]
        assert len(set(names)) == len(names)
