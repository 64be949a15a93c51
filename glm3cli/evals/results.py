"""Defines the result of a benchmark: answers, counts and averages, and the form of results.json."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from glm3cli.evals.statistics import Interval, wilson
from glm3cli.evals.suite import LETTERS, Suite

# Packages on which a score may depend; the result has their versions.
PACKAGES = ("torch", "megatron-core", "numpy", "sentencepiece")


@dataclass(frozen=True)
class Answer:
    """The model's answer to one question.

    Attributes:
        scores: Log-probabilities (in nats) of the letters' tokens after the cue; empty if the
            answer is a text.
        choice: The letter that the model chose, None if its text has no letter; or its text.
        text: The text of the likeliest token, if the choice was read from it; None otherwise.
        is_right: Whether a text counts as right; None where the answer is a letter.
    """

    scores: tuple[float, ...]
    choice: str | None
    text: str | None = None
    is_right: bool | None = None


class Tally(TypedDict):
    """The right answers of a subject or a category.

    Attributes:
        correct: Number of questions answered right.
        total: Number of questions asked.
        accuracy: `correct / total`, from 0 to 1.
        stderr: Standard error of the accuracy p over n questions: sqrt(p (1 - p) / n).
        interval: The 95 % interval of the accuracy (Wilson's).
    """

    correct: int
    total: int
    accuracy: float
    stderr: float
    interval: Interval


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
        scores: Log-probabilities (in nats) of the letters' tokens after the cue; empty if the
            answer is a text.
        choice: The letter that the model chose, null if its text has no letter; or the text that
            it gave.
        answer: The right letter, or the right text.
        shots: Number of shots that fit into the prompt.
        text: The text of the model's likeliest token; present only if the choice was read from it.
        is_right: Whether a text counts as right; present only if the answer is a text.
        rotation: By how many places the options had moved up; present only among
            `rotated_questions`.
    """

    subject: str
    index: int
    scores: list[float]
    choice: str | None
    answer: str
    shots: int
    text: NotRequired[str]
    is_right: NotRequired[bool]
    rotation: NotRequired[int]


class Rotations(TypedDict):
    """What changes when the options of every question move up by one letter, and so on.

    Attributes:
        accuracies: The share of right answers by the number of places.
        consistent: Share of the questions at which the model chose the same option at all places.
        always_right: Share of the questions that it had right at all places.
    """

    accuracies: list[float]
    consistent: float
    always_right: float


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
        interval: The 95 % interval of `micro` (Wilson's), if the questions are the sample.
        stderr_clustered: The cluster-robust standard error of `micro`, if the subjects are; null
            with one subject.
        interval_clustered: The 95 % interval by it; null with one subject.
        smallest_difference: The smallest difference of `micro` to another model's that so many
            questions can show; see `statistics.smallest_difference`.
        unparsed: Number of answers without a letter; they count as wrong.
        shortened: Number of prompts that lost shots to fit into the model's sequences.
        over_length: Number of prompts that are longer than these even without shots.
        unknown_subjects: Subjects that aren't the benchmark's own; they count in the suite's
            category for the rest.
        subjects: The tally of each subject.
        categories: The tally of each category that has any of the subjects.
        questions: The entry of each question, in the order of the prompts.
        rotations: What `--rotate-choices` has found; present only with it.
        rotated_questions: The entries of the questions whose options had moved; as above.
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
    interval: Interval
    stderr_clustered: float | None
    interval_clustered: Interval | None
    smallest_difference: float
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
    rotations: NotRequired[Rotations]
    rotated_questions: NotRequired[list[QuestionResult]]


def is_right(question: QuestionResult) -> bool:
    """Returns whether a question was answered right."""
    return question.get("is_right", question["choice"] == question["answer"])


def tally(right: Sequence[bool]) -> Tally:
    """Counts the questions (at least one) and those of them whose value in `right` is true."""
    total, correct = len(right), sum(right)
    accuracy = correct / total
    stderr = math.sqrt(accuracy * (1 - accuracy) / total)
    return Tally(
        correct=correct,
        total=total,
        accuracy=accuracy,
        stderr=stderr,
        interval=wilson(correct, total),
    )


def tally_subjects(questions: Iterable[QuestionResult]) -> dict[str, Tally]:
    """Returns the tally of each subject, in the questions' order."""
    return {subject: tally(values) for subject, values in right_by_subject(questions).items()}


def right_by_subject(questions: Iterable[QuestionResult]) -> dict[str, list[bool]]:
    """Returns whether each question of a subject was answered right, in the questions' order."""
    right: dict[str, list[bool]] = {}
    for question in questions:
        right.setdefault(question["subject"], []).append(is_right(question))
    return right


def tally_categories(suite: Suite, subjects: dict[str, Tally]) -> dict[str, CategoryTally]:
    """Returns the tally of each category that has any of `subjects`, in the suite's order."""
    members: dict[str, list[Tally]] = {name: [] for name in suite.categories}
    for subject, counts in subjects.items():
        for name in suite.categories_of(subject):
            members.setdefault(name, []).append(counts)
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


def rotations_of(asked: Sequence[QuestionResult], rotated: Sequence[QuestionResult]) -> Rotations:
    """Returns what has changed with the places of the options.

    Args:
        asked: The entries of the questions as they stand in their files.
        rotated: Those of the same questions, whose options have moved up.
    """
    of_each: dict[tuple[str, int], list[QuestionResult]] = {}
    at_place: dict[int, list[bool]] = {}
    for one in (*asked, *rotated):
        of_each.setdefault((one["subject"], one["index"]), []).append(one)
        at_place.setdefault(one.get("rotation", 0), []).append(is_right(one))
    picked = [{_option(one) for one in group} for group in of_each.values()]
    right = [all(is_right(one) for one in group) for group in of_each.values()]
    return Rotations(
        accuracies=[sum(at_place[place]) / len(at_place[place]) for place in sorted(at_place)],
        consistent=sum(len(options) == 1 for options in picked) / len(picked),
        always_right=sum(right) / len(right),
    )


def _option(one: QuestionResult) -> int | None:
    """Returns the place in the file of the option that the model chose."""
    if one["choice"] is None:
        return None
    return (LETTERS.index(one["choice"]) + one.get("rotation", 0)) % len(one["scores"])


class McNemar(TypedDict):
    """The table of right answers of two models, and the p-value of McNemar's exact test."""

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float


class SubjectDifference(TypedDict):
    """The scores of two models in a subject.

    Attributes:
        total: The number of questions.
        first: The accuracy of the first model.
        second: That of the second.
        difference: `second - first`.
        only_first: The number of questions that only the first has right.
        only_second: The number of those that only the second has right.
    """

    total: int
    first: float
    second: float
    difference: float
    only_first: int
    only_second: int


class Comparison(TypedDict):
    """The content of compare.json.

    Attributes:
        benchmark: Always `compare`.
        of: The benchmark that both results are of.
        first: The file and the model of the first result, and its accuracy.
        second: Those of the second.
        total: The number of questions.
        difference: The accuracy of the second less that of the first.
        stderr: The standard error of the difference, from the questions' differences.
        interval: Its 95 % interval by Student's t.
        p_value: That of the paired t test.
        stderr_clustered: The cluster-robust error over subjects; null with one subject.
        interval_clustered: The 95 % interval by it; null with one subject.
        mcnemar: McNemar's test.
        choices_changed: The number of questions at which the models chose differently.
        subjects: The difference in each subject.
        changed: The questions that one of the two has right: the subject, the index, both choices
            and the answer.
    """

    benchmark: str
    of: str
    first: dict[str, Any]
    second: dict[str, Any]
    total: int
    difference: float
    stderr: float
    interval: Interval
    p_value: float
    stderr_clustered: float | None
    interval_clustered: Interval | None
    mcnemar: McNemar
    choices_changed: int
    subjects: dict[str, SubjectDifference]
    changed: list[dict[str, Any]]
