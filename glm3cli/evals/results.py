"""Defines the result of a benchmark: answers, counts and averages, and the form of results.json."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from glm3cli.evals.suite import Suite

# Packages on which a score may depend; the result has their versions.
PACKAGES = ("torch", "megatron-core", "numpy", "sentencepiece")


@dataclass(frozen=True)
class Answer:
    """The model's answer to one question.

    Attributes:
        scores: Log-probabilities (in nats) of the tokens for A to D after the cue.
        choice: The letter that the model chose; None if its text has no letter.
        text: The text of the likeliest token, if the choice was read from it; None otherwise.
    """

    scores: tuple[float, ...]
    choice: str | None
    text: str | None = None


class Tally(TypedDict):
    """The right answers of a subject or a category.

    Attributes:
        correct: Number of questions answered right.
        total: Number of questions asked.
        accuracy: `correct / total`, from 0 to 1.
        stderr: Standard error of the accuracy p over n questions: sqrt(p (1 - p) / n).
    """

    correct: int
    total: int
    accuracy: float
    stderr: float


class CategoryTally(Tally):
    """The right answers of a category, with all questions of its subjects taken together.

    Attributes:
        macro: Mean of the accuracies of the category's subjects, from 0 to 1.
    """

    macro: float


class QuestionResult(TypedDict):
    """The entry of one question in results.json.

    Attributes:
        subject: The question's subject.
        index: The question's position in the subject's file, counted from 0.
        scores: Log-probabilities (in nats) of the tokens for A to D after the cue.
        choice: The letter that the model chose; null if its text has no letter.
        answer: The right letter.
        shots: Number of shots that fit into the prompt.
        text: The text of the model's likeliest token; present only if the choice was read from it.
    """

    subject: str
    index: int
    scores: list[float]
    choice: str | None
    answer: str
    shots: int
    text: NotRequired[str]


class EvalResult(TypedDict):
    """The content of results.json, the result of one benchmark run.

    Attributes:
        benchmark: The suite's name.
        protocol: The suite's protocol.
        shots: Number of solved questions per prompt that were asked for.
        is_score: False if `--limit` left questions out, so that the result is no score.
        micro: Share of right answers over all questions, from 0 to 1.
        macro: Mean of the subjects' accuracies, from 0 to 1.
        stderr: Standard error of `micro`: sqrt(p (1 - p) / n) over n questions.
        unparsed: Number of answers without a letter; they count as wrong.
        shortened: Number of prompts that lost shots to fit into the model's sequences.
        over_length: Number of prompts that are longer than these even without shots.
        unknown_subjects: Subjects that aren't the benchmark's own; they count in the suite's
            category for the rest.
        subjects: The tally of each subject.
        categories: The tally of each category that has any of the subjects.
        questions: The entry of each question, in the order of the prompts.
        prompt_sha256: `hash_texts` of the text of all prompts, in their order.
        settings: The options of the run by their names, its device, and its number of ranks.
        versions: The versions of glm3 and of the packages on which a score may depend.
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
    """Counts the questions (at least one) and those of them whose value in `right` is true."""
    total, correct = len(right), sum(right)
    accuracy = correct / total
    stderr = math.sqrt(accuracy * (1 - accuracy) / total)
    return Tally(correct=correct, total=total, accuracy=accuracy, stderr=stderr)


def tally_subjects(questions: Iterable[QuestionResult]) -> dict[str, Tally]:
    """Returns the tally of each subject, in the questions' order."""
    right: dict[str, list[bool]] = {}
    for question in questions:
        right.setdefault(question["subject"], []).append(question["choice"] == question["answer"])
    return {subject: tally(values) for subject, values in right.items()}


def tally_categories(suite: Suite, subjects: dict[str, Tally]) -> dict[str, CategoryTally]:
    """Returns the tally of each category that has any of `subjects`, in the suite's order."""
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
    """Returns the mean of the accuracies, each of the same weight."""
    accuracies = [one["accuracy"] for one in tallies]
    return math.fsum(accuracies) / len(accuracies)
