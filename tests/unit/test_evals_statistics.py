"""Standard errors, intervals and tests against scipy's."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from glm3cli.evals.statistics import (
    clustered_stderr,
    interval_of,
    mcnemar,
    paired_p_value,
    smallest_difference,
    stderr_of_mean,
    student_cdf,
    student_quantile,
    wilson,
)


@pytest.mark.parametrize(("correct", "total"), [(0, 5), (5, 5), (1, 1), (3, 10), (8700, 14042)])
def test_the_interval_of_a_share_is_wilsons(correct: int, total: int) -> None:
    expected = stats.binomtest(correct, total).proportion_ci(method="wilson")
    assert wilson(correct, total) == pytest.approx([*expected], abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 56, 101, 9_999, 14_041])
def test_student_is_scipys(freedom: int) -> None:
    tolerance = 1e-9 if freedom < 10_000 else 1e-4  # normal from there on
    for t in (-3.0, 0.0, 0.3, 1.0, 2.5, 12.0):
        assert student_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=tolerance)
    expected = stats.t.ppf(0.975, freedom)
    assert student_quantile(0.975, freedom) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    ("first", "second"), [(0, 0), (1, 0), (3, 9), (9, 3), (6, 6), (700, 801), (0, 40)]
)
def test_mcnemar_is_the_binomial_test(first: int, second: int) -> None:
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_paired_differences_are_students() -> None:
    drawn = random.Random(1)
    ours = [float(drawn.random() < 0.6) for _ in range(300)]
    theirs = [float(drawn.random() < 0.5) for _ in range(300)]
    found = stats.ttest_rel(ours, theirs)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, stderr = sum(differences) / 300, stderr_of_mean(differences)
    assert stderr == pytest.approx(stats.sem(differences))
    expected = found.confidence_interval(0.95)
    assert interval_of(mean, stderr, 299) == pytest.approx([expected.low, expected.high])
    assert paired_p_value(mean, stderr, 299) == pytest.approx(found.pvalue)
    assert (paired_p_value(0.0, 0.0, 9), paired_p_value(0.1, 0.0, 9)) == (1.0, 0.0)


def test_the_clustered_error_is_that_of_a_sandwich() -> None:
    drawn = random.Random(2)
    clusters = [
        [float(drawn.random() < share) for _ in range(size)]
        for size, share in [(30, 0.2), (12, 0.9), (50, 0.5), (7, 0.4)]
    ]
    # Of a regression on a constant: bread (X'X)^-1, meat the squared sums of residuals.
    values = np.concatenate(clusters)
    groups = np.repeat(range(4), [len(one) for one in clusters])
    residuals = values - values.mean()
    meat = sum(residuals[groups == g].sum() ** 2 for g in range(4))
    expected = math.sqrt(meat / len(values) ** 2 * 4 / 3)
    assert clustered_stderr(clusters) == pytest.approx(expected)
    assert clustered_stderr(clusters) > 1.5 * stderr_of_mean(list(values))
    assert clustered_stderr(clusters[:1]) is None


def test_the_smallest_difference_has_eighty_per_cent_power() -> None:
    size, share = 400, 0.5
    stderr = math.sqrt(share * (1 - share) / size)
    least = smallest_difference(stderr)
    drawn = np.random.default_rng(3)
    ours = drawn.normal(share, stderr, 40_000)
    theirs = drawn.normal(share + least, stderr, 40_000)
    shown = np.abs(theirs - ours) / (stderr * math.sqrt(2)) > stats.norm.ppf(0.975)
    assert shown.mean() == pytest.approx(0.8, abs=0.01)
