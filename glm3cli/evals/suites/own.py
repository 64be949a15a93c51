"""Reads questions of one's own from a JSON Lines file.

A row has `question`, `answer` and maybe `choices`, `subject` and `category`. With choices, the
answer is a letter, the place of an option from 0 on, or an option; without, a text, or a list of
texts each of which is right.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glm3cli.errors import DataError
from glm3cli.evals.suite import LETTERS, Question

_SUBJECT = "all"  # of rows that have none


def by_subject(rows: Iterable[tuple[Question, str, str]]) -> dict[str, list[Question]]:
    """Returns the questions of each subject, numbered from 0."""
    found: dict[str, list[Question]] = {}
    for question, _, _ in rows:
        group = found.setdefault(question.subject, [])
        group.append(replace(question, index=len(group)))
    return found


def read_rows(path: Path) -> Iterator[tuple[Question, str, str]]:
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
