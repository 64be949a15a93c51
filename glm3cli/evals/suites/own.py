"""Reads questions of one's own from a JSON Lines file, or a table (CSV, parquet or Arrow).

A row has `question`, `answer` and maybe options, `subject` and `category`. With options, the answer
is a letter, the place of an option from 0 on, or an option; without, a text, or a list of texts
each of which is right.

Options are written as common data sets have them: a list in `choices` (in MMLU-Pro `options`), the
columns A, B and so on of C-Eval and CMMLU, or ARC's `choices` with `text` and `label`, of which
`answerKey` names one.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glm3cli.data.files import format_of, has_format
from glm3cli.data.preprocess.readers.bad_rows import BadRow
from glm3cli.data.preprocess.readers.sources import read_chunks, rows_of
from glm3cli.errors import DataError
from glm3cli.evals.suite import LETTERS, Question
from glm3cli.host.parsing import parse_json
from glm3cli.parallel.launch import is_speaker

_log = logging.getLogger(__name__)

_SUBJECT = "all"  # of rows that have none
_QUESTIONS = ("question", "Question")
_ANSWERS = ("answer", "Answer", "answerKey", "answer_index")
_OPTIONS = ("choices", "options")
_PASSAGES = ("context", "passage", "article")  # what a question is about, shown in front of it
# What is known not to change how a question is asked.
_UNASKED = ("id", "question_id", "explanation", "cot_content", "src", "")
_KNOWN = {*_QUESTIONS, *_ANSWERS, *_OPTIONS, *_PASSAGES, *_UNASKED, "subject", "category"}


def by_subject(rows: Iterable[tuple[Question, str, str]]) -> dict[str, list[Question]]:
    """Returns the questions of each subject, numbered from 0."""
    found: dict[str, list[Question]] = {}
    for question, _, _ in rows:
        group = found.setdefault(question.subject, [])
        group.append(replace(question, index=len(group)))
    return found


def read_rows(path: Path) -> Iterator[tuple[Question, str, str]]:
    """Yields the questions of a file, each with its category and its place in the file.

    A log line names the columns that aren't read, once for the file.

    Raises:
        DataError: The file is missing, or a row is wrong.
    """
    passed_over: dict[str, None] = {}
    is_table = has_format(path) and format_of(path) in ("csv", "parquet", "arrow")
    for row, where in _table_rows(path) if is_table else _json_rows(path):
        if not isinstance(row, dict):
            raise DataError(f"{where} is no JSON object", "write {...} in each line")
        there = [name for name, value in row.items() if value is not None]
        passed_over |= dict.fromkeys(
            name for name in there if name not in _KNOWN and name not in LETTERS
        )
        yield _question(row, where), _text(row, "category", where, ""), where
    if passed_over and is_speaker():
        names = _whole(", ".join(passed_over))
        _log.warning("%s: what is in %s is no part of the questions", path, names)


def _json_rows(path: Path) -> Iterator[tuple[Any, str]]:
    """Yields the value of each line, and where it is."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no UTF-8: {error}"
        raise DataError(
            f"{path}: {reason}", "give JSON Lines in UTF-8, or a .csv, .parquet or .arrow file"
        ) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield parse_json(line), where
            except ValueError as error:
                raise DataError(f"{where} is not JSON: {error}", "mend the line") from None


def _table_rows(path: Path) -> Iterator[tuple[Any, str]]:
    """Yields the rows of a file with columns, and where each is."""
    for chunk in read_chunks(path, list):
        for index, row in enumerate(rows_of(chunk)):
            where = chunk.where(index)
            if isinstance(row, BadRow):
                raise DataError(f"{where} {row.problem}", "mend the row")
            yield row, where


def _question(row: Mapping[str, Any], where: str) -> Question:
    """Returns the question of a row."""
    text = _text(row, _first(row, _QUESTIONS), where)
    if passage := _text(row, _first(row, _PASSAGES), where, ""):
        text = f"{passage}\n{text}"
    subject = _text(row, "subject", where, _SUBJECT)
    labels, choices = _options(row, where)
    answer = row.get(_first(row, _ANSWERS))
    if not choices:
        given = answer if isinstance(answer, list) else [answer]
        right = [_whole(str(one)) for one in given if isinstance(one, str | int | float)]
        if not right or len(right) < len(given) or not all(map(str.strip, right)):
            raise DataError(f"{where}: answer is {answer!r}", "give a text or a list of texts")
        return Question(subject, 0, text, (), right[0], also_right=tuple(right[1:]))
    right_one = LETTERS[_place(answer, labels, choices, where)]
    return Question(subject, 0, text, tuple(map(_whole, choices)), right_one)


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """Returns the first of some names under which a row has something; else the first of all."""
    return next((name for name in names if row.get(name) is not None), names[0])


def _options(row: Mapping[str, Any], where: str) -> tuple[Sequence[str], Sequence[str]]:
    """Returns the names of the options of a row, and the options; none of a free question.

    Raises:
        DataError: They have none of the forms, or several.
    """
    columns = [letter for letter in LETTERS if row.get(letter) not in (None, "")]
    given = [name for name in _OPTIONS if row.get(name) is not None]
    if len(given) + bool(columns) > 1:
        names = ", ".join([*given, *columns])
        raise DataError(f"{where} has options in {names}", "give them in one of the forms")
    if not given and not columns:
        return (), ()
    name = given[0] if given else ", ".join(columns)
    choices: Any = row[name] if given else [row[letter] for letter in columns]
    labels: Any = columns or list(LETTERS)
    if isinstance(choices, Mapping):
        labels, choices = choices.get("label"), choices.get("text")
    elif given and isinstance(choices, list):
        labels = labels[: len(choices)]
    is_right = _are_texts(labels) and _are_texts(choices) and len(labels) == len(choices)
    if columns != list(LETTERS[: len(columns)]) or not is_right:
        shown = repr(row[name]) if given else "all that there is of A, B and so on"
        raise DataError(f"{where}: {name} is {shown}", f"give a list of 2 to {len(LETTERS)} texts")
    return labels, choices


def _are_texts(value: Any) -> bool:
    """Returns whether a value is a list of as many texts as a question may have options."""
    is_list = isinstance(value, list) and 2 <= len(value) <= len(LETTERS)
    return is_list and all(isinstance(one, str) for one in value)


def _place(answer: Any, labels: Sequence[str], choices: Sequence[str], where: str) -> int:
    """Returns the place of the right option, from 0.

    Raises:
        DataError: The answer is none of the options.
    """
    is_number = isinstance(answer, int) and not isinstance(answer, bool)
    if is_number or isinstance(answer, str):
        name = str(answer).strip()
        if name in labels:
            return labels.index(name)
        if is_number and 0 <= answer < len(choices):
            return int(answer)
        if choices.count(answer) == 1:
            return choices.index(answer)
    raise DataError(
        f"{where}: answer is {answer!r}",
        f"give one of {', '.join(labels)}, a place from 0 to {len(choices) - 1}, or an option",
    )


def _text(row: Mapping[str, Any], name: str, where: str, default: str | None = None) -> str:
    """Returns a text of a row; half of a surrogate pair becomes U+FFFD, as in training's data."""
    value = row.get(name)
    if value is None or value == "":
        value = default
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {row.get(name)!r}", "give a text")
    return _whole(value)


def _whole(text: str) -> str:
    """Returns a text with U+FFFD for each half of a surrogate pair, as the tokenizer reads it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
