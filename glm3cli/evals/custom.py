"""Questions of one's own, from a JSON Lines file: `glm3 eval custom`.

A row has `question`, `answer` and maybe `choices`, `subject` and `category`. With choices, the
answer is a letter, the place of an option from 0 on, or an option; without, a text, or a list of
texts each of which is right.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from glm3cli.config.evaluation import CustomConfig
from glm3cli.errors import ConfigError, DataError
from glm3cli.evals.exact import ExactRule
from glm3cli.evals.ledger import Display, no_display
from glm3cli.evals.questions import Subject
from glm3cli.evals.results import EvalResult
from glm3cli.evals.runner import ask_questions
from glm3cli.evals.suite import LETTERS, Question, Suite

_SUBJECT = "all"  # of rows that have none


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
    rows = list(_rows(config.file))
    if not rows:
        raise DataError(f"{config.file} has no questions", "write one JSON object a line")
    shots = _by_subject(_rows(config.shots_file)) if config.shots_file is not None else {}
    has_choices = bool(rows[0][0].choices)
    for question, _, where in rows:
        if bool(question.choices) != has_choices:
            raise DataError(
                f"{where} is a question {'with' if question.choices else 'without'} choices, "
                "unlike the first one",
                "give files of one kind",
            )
    suite = suite_of(config, rows, has_choices=has_choices)
    subjects = _subjects(config, _by_subject(iter(rows)), shots)
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


def read_questions(file: Path) -> dict[str, list[Question]]:
    """Returns the questions of a file by subject, each group numbered from 0.

    Raises:
        DataError: The file is missing, or a row is wrong.
    """
    return _by_subject(_rows(file))


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


def _by_subject(rows: Iterator[tuple[Question, str, str]]) -> dict[str, list[Question]]:
    """Returns the questions of each subject, numbered from 0."""
    found: dict[str, list[Question]] = {}
    for question, _, _ in rows:
        group = found.setdefault(question.subject, [])
        group.append(replace(question, index=len(group)))
    return found


def _rows(path: Path) -> Iterator[tuple[Question, str, str]]:
    """Yields the questions of a file, each with its category and its place in the file.

    Raises:
        DataError: The file is missing, or a row is wrong.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no UTF-8: {error}"
        raise DataError(f"{path}: {reason}", "give a JSON Lines file in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where} is not JSON: {error}", "mend the line") from None
            if not isinstance(row, dict):
                raise DataError(f"{where} is no JSON object", "write {...} in each line")
            yield _question(row, where), _text(row, "category", where, ""), where


def _question(row: Mapping[str, Any], where: str) -> Question:
    """Returns the question of a row."""
    text, subject = _text(row, "question", where), _text(row, "subject", where, _SUBJECT)
    choices, answer = row.get("choices"), row.get("answer")
    if choices is None:
        given = answer if isinstance(answer, list) else [answer]
        right = [str(one) for one in given if isinstance(one, str | int | float)]
        if not right or len(right) < len(given) or not all(map(str.strip, right)):
            raise DataError(f"{where}: answer is {answer!r}", "give a text or a list of texts")
        return Question(subject, 0, text, (), right[0], also_right=tuple(right[1:]))
    is_list = isinstance(choices, list) and all(isinstance(one, str) for one in choices)
    if not is_list or not 2 <= len(choices) <= len(LETTERS):
        raise DataError(
            f"{where}: choices is {choices!r}", f"give a list of 2 to {len(LETTERS)} texts"
        )
    return Question(subject, 0, text, tuple(choices), _letter(answer, choices, where))


def _letter(answer: Any, choices: Sequence[str], where: str) -> str:
    """Returns the letter of the right option.

    Raises:
        DataError: The answer is none of the options.
    """
    letters = LETTERS[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return letters[answer]
    if isinstance(answer, str) and answer.strip() in letters:
        return answer.strip()
    if isinstance(answer, str) and choices.count(answer) == 1:
        return letters[choices.index(answer)]
    raise DataError(
        f"{where}: answer is {answer!r}",
        f"give one of {', '.join(letters)}, a place from 0 to {len(choices) - 1}, or an option",
    )


def _text(row: Mapping[str, Any], name: str, where: str, default: str | None = None) -> str:
    """Returns a text of a row."""
    value = row.get(name, default)
    if not isinstance(value, str) or (default is None and not value):
        raise DataError(f"{where}: {name} is {value!r}", "give a text")
    return value
