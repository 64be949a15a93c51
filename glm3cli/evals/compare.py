"""Compares two results of the same questions: `glm3 eval compare`.

Each question is asked of both models, so that the difference of their scores has the error of the
differences at the questions, which is smaller than that of either score.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm3cli.config.evaluation import CompareConfig
from glm3cli.errors import DataError
from glm3cli.evals.page.comparison import write_comparison
from glm3cli.evals.results import (
    Comparison,
    McNemar,
    QuestionResult,
    SubjectDifference,
    is_right,
)
from glm3cli.evals.statistics import (
    clustered_stderr,
    interval_of,
    mcnemar,
    paired_p_value,
    stderr_of_mean,
)
from glm3cli.evals.suites.named import questions_of
from glm3cli.host.files import write_json

_NEEDED = ("benchmark", "micro", "questions", "prompt_sha256", "settings")


def run_compare(config: CompareConfig) -> Comparison:
    """Compares two results, and writes what it finds to `config.output`, with its page.

    Raises:
        DataError: A file is no result, or the two are of different questions.
    """
    first, second = read_result(config.first), read_result(config.second)
    found = compare(first, second, (str(config.first), str(config.second)))
    notes = []
    try:
        asked = questions_of(first)
    except DataError as error:
        asked, notes = {}, [f"The questions' texts aren't shown: {error.message}."]
    write_comparison(config.output, found, (first, second), asked, notes)
    write_json(config.output, found)
    return found


def read_result(path: Path) -> dict[str, Any]:
    """Reads a results.json.

    Raises:
        DataError: It can't be read, is cut off, or is no result with questions.
    """
    way = "give the results.json of an eval of questions; if it was cut off, run that again"
    try:
        result = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", way) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", way) from None
    if not isinstance(result, dict) or (missing := [k for k in _NEEDED if k not in result]):
        what = ", ".join(missing) if isinstance(result, dict) else "questions"
        raise DataError(f"{path} is no result of questions: it has no {what}", way)
    for question in result["questions"]:
        if not {"subject", "index", "choice", "answer"} <= question.keys():
            raise DataError(f"{path} has an entry that is no question: {question!r}", way)
    return result


def compare(
    first: Mapping[str, Any], second: Mapping[str, Any], files: tuple[str, str]
) -> Comparison:
    """Compares two results of the same prompts.

    Args:
        first: The one result.
        second: The other one.
        files: The names of their files.

    Raises:
        DataError: The results are of different questions or prompts.
    """
    _check_same(first, second, files)
    pairs = list(zip(first["questions"], second["questions"], strict=True))
    right = [(is_right(a), is_right(b)) for a, b in pairs]
    by_subject: dict[str, list[tuple[bool, bool]]] = {}
    for (one, _), both in zip(pairs, right, strict=True):
        by_subject.setdefault(one["subject"], []).append(both)
    differences = {name: [b - a for a, b in group] for name, group in by_subject.items()}
    values = [float(value) for group in differences.values() for value in group]
    mean = sum(values) / len(values)
    stderr = stderr_of_mean(values) if len(values) > 1 else 0.0
    clustered = clustered_stderr(differences.values())
    only_first, only_second = right.count((True, False)), right.count((False, True))
    return Comparison(
        benchmark="compare",
        of=first["benchmark"],
        first=_side(first, files[0]),
        second=_side(second, files[1]),
        total=len(pairs),
        difference=mean,
        stderr=stderr,
        interval=interval_of(mean, stderr, max(1, len(values) - 1)),
        p_value=paired_p_value(mean, stderr, max(1, len(values) - 1)),
        stderr_clustered=clustered,
        interval_clustered=None
        if clustered is None
        else interval_of(mean, clustered, len(differences) - 1),
        mcnemar=McNemar(
            both=right.count((True, True)),
            only_first=only_first,
            only_second=only_second,
            neither=right.count((False, False)),
            p_value=mcnemar(only_first, only_second),
        ),
        choices_changed=sum(a["choice"] != b["choice"] for a, b in pairs),
        subjects={name: _of_subject(group) for name, group in by_subject.items()},
        changed=[_changed(a, b) for a, b in pairs if is_right(a) != is_right(b)],
    )


def _check_same(
    first: Mapping[str, Any], second: Mapping[str, Any], files: tuple[str, str]
) -> None:
    """Checks that two results are of the same prompts.

    Raises:
        DataError: They aren't.
    """
    ours, theirs = first["prompt_sha256"], second["prompt_sha256"]
    if ours != theirs:
        differing = [
            f"{key} {first.get(key)} and {second.get(key)}"
            for key in ("benchmark", "protocol", "shots")
            if first.get(key) != second.get(key)
        ]
        more = f" ({'; '.join(differing)})" if differing else ""
        raise DataError(
            f"{files[0]} and {files[1]} are of different prompts{more}: their prompt_sha256 are "
            f"{str(ours)[:16]} and {str(theirs)[:16]}",
            "compare results of the same questions, shots, protocol and template; a model with "
            "shorter sequences drops shots of long questions, as `shortened` of its result tells",
        )
    keys = [
        [(one["subject"], one["index"], one["answer"]) for one in result["questions"]]
        for result in (first, second)
    ]
    if keys[0] != keys[1] or not keys[0]:
        raise DataError(
            f"{files[0]} and {files[1]} list different questions, or none",
            "run the evals again",
        )


def _side(result: Mapping[str, Any], file: str) -> dict[str, Any]:
    settings = result["settings"]
    model, lora = settings.get("model"), settings.get("lora")
    return {"file": file, "model": model, "lora": lora, "micro": result["micro"]}


def _of_subject(pairs: list[tuple[bool, bool]]) -> SubjectDifference:
    """Returns the difference in a subject."""
    total = len(pairs)
    ours, theirs = sum(a for a, _ in pairs), sum(b for _, b in pairs)
    return SubjectDifference(
        total=total,
        first=ours / total,
        second=theirs / total,
        difference=(theirs - ours) / total,
        only_first=pairs.count((True, False)),
        only_second=pairs.count((False, True)),
    )


def _changed(first: QuestionResult, second: QuestionResult) -> dict[str, Any]:
    return {
        "subject": first["subject"],
        "index": first["index"],
        "first": first["choice"],
        "second": second["choice"],
        "answer": first["answer"],
    }
