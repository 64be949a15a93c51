"""How far a score may be from what more questions would give, and two scores from each other.

Questions are taken for a sample of all that could have been asked (Miller, Adding Error Bars to
Evals, 2024). Where those of a subject resemble each other, the sample is one of subjects instead;
the cluster-robust error says how far that is.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist, fmean

Interval = list[float]  # its two ends

# Intervals hold the true value in 95 of 100 samples.
_TAIL = 0.025
_Z = NormalDist().inv_cdf(1 - _TAIL)
# A difference is called shown if it would be found in 80 of 100 samples.
_POWER = NormalDist().inv_cdf(0.8)


def wilson(correct: int, total: int) -> Interval:
    """Returns the 95 % interval of a share by Wilson's formula (1927), which stays within 0 and 1.

    Args:
        correct: The number of right answers.
        total: The number of all answers; at least one.
    """
    share, weight = correct / total, _Z * _Z / total
    middle = (share + weight / 2) / (1 + weight)
    reach = math.sqrt(share * (1 - share) * weight + weight * weight / 4) / (1 + weight)
    return [max(0.0, middle - reach), min(1.0, middle + reach)]


def stderr_of_mean(values: Sequence[float]) -> float:
    """Returns the standard error of a mean of at least two values: s / sqrt(n), n - 1 in s."""
    mean = fmean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def clustered_stderr(clusters: Iterable[Sequence[float]]) -> float | None:
    """Returns the standard error of a mean whose values come in clusters.

    It is sqrt(G / (G - 1) sum_g (sum_i (x_gi - mean))^2) / n, the cluster-robust error of Liang and
    Zeger (1986) with the usual correction for few clusters.

    Args:
        clusters: The values of each cluster, such as a subject's answers.

    Returns:
        The error; None with fewer than two clusters.
    """
    groups = [group for group in clusters if group]
    if len(groups) < 2:
        return None
    values = [value for group in groups for value in group]
    mean = fmean(values)
    squares = math.fsum(math.fsum(value - mean for value in group) ** 2 for group in groups)
    return math.sqrt(squares * len(groups) / (len(groups) - 1)) / len(values)


def interval_of(mean: float, stderr: float, freedom: int) -> Interval:
    """Returns the 95 % interval of a mean by Student's t with so many degrees of freedom."""
    reach = student_quantile(1 - _TAIL, freedom) * stderr
    return [mean - reach, mean + reach]


def smallest_difference(stderr: float) -> float:
    """Returns the smallest difference to another model that as many questions can show.

    Such a difference is found at the 5 % level in 80 of 100 samples, if the other model has other
    questions and the same error; on the same questions `glm3 eval compare` shows smaller ones.

    Args:
        stderr: The standard error of one of the scores.
    """
    return (_Z + _POWER) * math.sqrt(2) * stderr


def mcnemar(first_only: int, second_only: int) -> float:
    """Returns the p-value of McNemar's exact test: that of as uneven a split of a fair coin.

    Args:
        first_only: The number of questions that only the first model has right.
        second_only: The number of those that only the second has right.
    """
    total, fewer = first_only + second_only, min(first_only, second_only)
    term = tail = 1  # binomial coefficients, whole numbers
    for k in range(fewer):
        term = term * (total - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**total)


def paired_p_value(mean: float, stderr: float, freedom: int) -> float:
    """Returns the p-value of the paired t test: that a mean difference of 0 gives such a one."""
    if stderr == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * (1 - student_cdf(abs(mean) / stderr, freedom))


def student_cdf(t: float, freedom: int) -> float:
    """Returns the probability that Student's t is at most `t`.

    For a whole number of degrees of freedom it is a finite sum (Abramowitz and Stegun, 26.7.3
    and 26.7.4). From 10,000 on, the normal distribution is as exact as a score.
    """
    if freedom >= 10_000:
        return NormalDist().cdf(t)
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    if freedom % 2:
        term = total = cosine if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = 2 / math.pi * (angle + sine * total)
    else:
        term = total = 1.0
        for k in range(2, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = sine * total
    return 0.5 + inside / 2


def student_quantile(share: float, freedom: int) -> float:
    """Returns the value below which Student's t is with probability `share`, above 0.5."""
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < share:
        high *= 2
    return _bisect(lambda t: student_cdf(t, freedom) < share, low, high)


def _bisect(is_below: Callable[[float], bool], low: float, high: float) -> float:
    """Returns the place between two values at which something stops being below."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2
