"""Writes the page of two results side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm3cli.evals.page import parts
from glm3cli.evals.page.write import write_page
from glm3cli.evals.results import Comparison, QuestionResult, is_right
from glm3cli.evals.suite import Question


def write_comparison(
    output: Path,
    found: Comparison,
    results: tuple[Mapping[str, Any], Mapping[str, Any]],
    asked: Mapping[tuple[str, int], Question],
    notes: Sequence[str],
) -> None:
    """Writes the page of a comparison, with both results side by side.

    Args:
        output: The JSON file of the comparison.
        found: Its content.
        results: The two results.
        asked: The questions, by subject and index; it may be empty.
        notes: Sentences on how to read the page.
    """
    low, high = found["interval"]
    table = found["mcnemar"]
    tiles = {
        "first": f"{found['first']['micro']:.2%}",
        "second": f"{found['second']['micro']:.2%}",
        "difference": f"{found['difference']:+.2%}",
        "95 % interval": f"{low:+.2%} to {high:+.2%}",
        "McNemar's p": f"{table['p_value']:.3g}",
        "only the first right": f"{table['only_first']:,}",
        "only the second right": f"{table['only_second']:,}",
        "questions": f"{found['total']:,}",
    }
    bars = []
    for name, one in found["subjects"].items():
        told = f"{one['first']:.1%} → {one['second']:.1%}"
        bars.append(parts.Bar(name, one["first"], told, other=one["second"]))
    ordered = sorted(found["subjects"].items(), key=lambda item: -item[1]["difference"])
    sides = [
        (
            name,
            one["difference"],
            f"{one['difference']:+.1%}  +{one['only_second']} -{one['only_first']}",
        )
        for name, one in ordered
    ]
    rows = [
        _row(a, b, asked.get((a["subject"], a["index"])))
        for a, b in zip(*(result["questions"] for result in results), strict=True)
        if is_right(a) != is_right(b) or a["choice"] != b["choice"]
    ]
    write_page(
        output,
        title=f"{found['of']}: {_name(found['first'])} and {_name(found['second'])}",
        about=f"first: {found['first']['file']} · second: {found['second']['file']}",
        tiles=tiles,
        sections=[
            ("Subjects: first above, second below", parts.bars(bars)),
            ("What the second gains and loses", parts.differences(sides)),
        ],
        notes=["The questions below are those that the two answered differently.", *notes],
        questions=rows,
    )


def _row(
    first: QuestionResult, second: QuestionResult, question: Question | None
) -> dict[str, Any]:
    """Returns what the page shows of a question that was answered differently."""
    row: dict[str, Any] = {
        "subject": first["subject"],
        "index": first["index"],
        "right": is_right(second),
        "choice": f"{_said(first)} | {_said(second)}",
        "answer": first["answer"],
        "told": f"{_word(first)}, then {_word(second)}",
    }
    if question is not None:
        options = zip(question.letters, question.choices, strict=True)
        lines = [question.text, *(f"{letter}. {option}" for letter, option in options)]
        row["text"] = "\n".join(lines)
    return row


def _name(side: Mapping[str, Any]) -> str:
    return str(side["lora"] or side["model"] or side["file"])


def _word(one: QuestionResult) -> str:
    return "right" if is_right(one) else "wrong"


def _said(one: QuestionResult) -> str:
    return "nothing" if one["choice"] is None else one["choice"]
