"""Asks questions of one's own: `glm3 eval custom`; `suites/own` reads them."""

from collections.abc import Mapping, Sequence
from itertools import islice

from glm3cli.config.evaluation import CustomConfig
from glm3cli.errors import ConfigError, DataError
from glm3cli.evals.exact import ExactRule
from glm3cli.evals.ledger import Display, no_display
from glm3cli.evals.questions import Subject
from glm3cli.evals.results import EvalResult
from glm3cli.evals.runner import ask_questions
from glm3cli.evals.suite import Question, Suite
from glm3cli.evals.suites.own import by_subject, read_rows


def run_custom(
    config: CustomConfig, display: Display = no_display
) -> tuple[EvalResult, Suite] | None:
    """Asks the questions of a file, and writes the result as `run_benchmark` does.

    Returns:
        The result and how it was asked; None in a process that has only started the ranks.

    Raises:
        CheckpointError: The model can't be read, or its log-probabilities are NaN.
        ConfigError: There are too few shots, or a subject doesn't exist.
        DataError: A file is missing or empty, or a row is wrong.
    """
    rows = list(read_rows(config.file))
    if not rows:
        raise DataError(f"{config.file} has no questions", "write one JSON object a line")
    shots = by_subject(read_rows(config.shots_file)) if config.shots_file is not None else {}
    has_choices = bool(rows[0][0].choices)
    for question, _, where in rows:
        if bool(question.choices) != has_choices:
            raise DataError(
                f"{where} is a question {'with' if question.choices else 'without'} choices, "
                "unlike the first one",
                "give files of one kind",
            )
    suite = suite_of(config, rows, has_choices=has_choices)
    subjects = _subjects(config, by_subject(rows), shots)
    rule = None
    if not has_choices:
        rule = ExactRule(
            config.max_new_tokens,
            tuple(config.stop) or ("\n",),
            config.answer_pattern,
            config.ignore_case,
        )
        if config.rotate_choices:
            raise ConfigError(
                "--rotate-choices: the questions have no choices", "leave the option out"
            )
    result = ask_questions(config, suite, subjects, display, rule)
    return None if result is None else (result, suite)


def suite_of(
    config: CustomConfig, rows: Sequence[tuple[Question, str, str]], *, has_choices: bool
) -> Suite:
    """Returns how the questions of a file are asked."""
    categories: dict[str, list[str]] = {}
    for question, category, _ in rows:
        if category and question.subject not in categories.setdefault(category, []):
            categories[category].append(question.subject)
    return Suite(
        name=config.file.stem,
        protocol="logits" if has_choices else "exact",
        split="",
        columns=None,
        header=config.header.replace("\\n", "\n"),
        question="{text}\n",
        cue=config.cue,
        gap=" ",
        titles={},
        categories=categories,
        rest="all",
        judge="letters" if has_choices else "exact",
    )


def _subjects(
    config: CustomConfig,
    asked: Mapping[str, list[Question]],
    shots: Mapping[str, list[Question]],
) -> list[Subject]:
    """Returns the subjects with their shots: those of the subject, or of all if it has none.

    Raises:
        ConfigError: There are too few shots, or a subject doesn't exist.
    """
    if unknown := [name for name in config.subject_names if name not in asked]:
        raise ConfigError(
            f"--subjects: {config.file} has no subject {unknown[0]!r}",
            f"there are {', '.join(asked)}",
        )
    everything = [one for group in shots.values() for one in group]
    found = []
    for name in config.subject_names or asked:
        solved = shots.get(name, everything)[: config.shots]
        if len(solved) < config.shots:
            raise ConfigError(
                f"--shots {config.shots}, but {config.shots_file} has {len(solved)} for {name}",
                f"use --shots {len(solved)} or fewer",
            )
        questions = tuple(islice(asked[name], config.limit))
        found.append(Subject(name, questions, tuple(solved)))
    return found
