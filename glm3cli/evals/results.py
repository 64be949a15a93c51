"""The result of a benchmark: counts, averages, and what results.json holds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from glm3cli.evals.suite import Suite

# Packages on which a score may depend; their versions stand in the result.
PACKAGES = ("torch", "megatron-core", "numpy", "sentencepiece")


@dataclass(frozen=True)
class Answer:
    """What the model said to one question.

    Attributes:
        scores: Log-probabilities of the tokens A to D after the cue.
        choice: The letter it chose; None if its text has none.
        text: What it wrote, where that was looked at.
    """

    scores: tuple[float, ...]
    choice: str | None
    text: str | None = None


class Tally(TypedDict):
    """Right answers of a subject or a category."""

    correct: int
    total: int
    accuracy: float
    stderr: float


class CategoryTally(Tally):
    """A category's questions together, and the mean over its subjects."""

    macro: float


class QuestionResult(TypedDict):
    """One question.

    `shots` are those its prompt had room for, `choice` is null where the text has no letter, and
    `text` is there only where the choice was read from text.
    """

    subject: str
    index: int
    scores: list[float]
    choice: str | None
    answer: str
    shots: int
    text: NotRequired[str]


class EvalResult(TypedDict):
    """What results.json holds.

    `micro` is the share of right answers, `stderr` its standard error sqrt(p (1 - p) / n), and
    `macro` the mean of the subjects' accuracies. `is_score` is false where `--limit` left
    questions out. `unparsed` answers have no letter and count as wrong; `shortened` prompts had
    to lose shots to fit the model, and `over_length` ones are too long without any.
    `unknown_subjects` are not the benchmark's own and count in its category "other".
    """

    benchmark: str
    protocol: str
    shots: int
    is_score: bool
    micro: float
    macro: float
    stderr: float
    unparsed: int
    shortened: int
    over_length: int
    unknown_subjects: list[str]
    subjects: dict[str, Tally]
    categories: dict[str, CategoryTally]
    questions: list[QuestionResult]
    prompt_sha256: str
    settings: dict[str, Any]
    versions: dict[str, str]


def tally(right: Sequence[bool]) -> Tally:
    """Counts right answers; there must be at least one question."""
    total, correct = len(right), sum(right)
    accuracy = correct / total
    stderr = math.sqrt(accuracy * (1 - accuracy) / total)
    return Tally(correct=correct, total=total, accuracy=accuracy, stderr=stderr)


def tally_subjects(questions: Iterable[QuestionResult]) -> dict[str, Tally]:
    """The tally of each subject, in the questions' order."""
    right: dict[str, list[bool]] = {}
    for question in questions:
        right.setdefault(question["subject"], []).append(question["choice"] == question["answer"])
    return {subject: tally(values) for subject, values in right.items()}


def tally_categories(suite: Suite, subjects: dict[str, Tally]) -> dict[str, CategoryTally]:
    """The tally of each category that has any of `subjects`, in the suite's order."""
    members: dict[str, list[Tally]] = {name: [] for name in suite.categories}
    for subject, counts in subjects.items():
        for name in suite.categories_of(subject):
            members[name].append(counts)
    result = {}
    for name, tallies in members.items():
        if tallies:
            right = [i < one["correct"] for one in tallies for i in range(one["total"])]
            result[name] = CategoryTally(**tally(right), macro=mean_accuracy(tallies))
    return result


def mean_accuracy(tallies: Iterable[Tally]) -> float:
    """The mean of accuracies, each of the same weight."""
    accuracies = [one["accuracy"] for one in tallies]
    return math.fsum(accuracies) / len(accuracies)
