"""Writes the page of a run of lm-evaluation-harness."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm3cli.evals.page import parts
from glm3cli.evals.page.write import shares, write_page
from glm3cli.evals.suite import LETTERS

# The metrics that say whether an answer is right, and how much of a prompt is shown.
_RIGHT = ("acc", "exact_match", "pass@1", "pass_at_k")
_SHOWN = 600


def write_harness(output: Path, result: Mapping[str, Any]) -> None:
    """Writes the page beside the JSON file of a result.

    Args:
        output: The JSON file.
        result: Its content.
    """
    bars, others = [], []
    for task, metrics in result["results"].items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
                continue
            told = f"{task}, {metric}" + (f" ({filtered})" if filtered != "none" else "")
            error = metrics.get(f"{metric}_stderr,{filtered}")
            if isinstance(error, int | float) and 0 <= value <= 1:
                reach = [max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error)]
                bars.append(parts.Bar(told, value, f"{value:.2%} ± {error:.2%}", reach))
            else:
                others.append((told, f"{value:.6g}"))
    sections = [("Tasks, with 95 % intervals", parts.bars(bars))] if bars else []
    if others:
        sections.append(("Other metrics", parts.table([], others)))
    write_page(
        output,
        title="lm-evaluation-harness",
        about=str(result["settings"].get("model", "")),
        tiles={"tasks": str(len(result["results"]))},
        sections=sections,
        notes=[] if result["is_score"] else ["Not a score: --limit left questions out."],
        questions=list(_questions(result.get("samples", {}))),
        settings=result["settings"] | result["versions"],
    )


def _questions(samples: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields what the page shows of every answer that has a right and a wrong."""
    for task, rows in samples.items():
        for row in rows:
            found = [row[name] for name in _RIGHT if isinstance(row.get(name), int | float)]
            if found:
                requests = [tuple(one) for one in row.get("arguments", ())]
                yield {
                    "subject": task,
                    "index": row.get("doc_id", 0),
                    "right": bool(found[0]),
                    "text": _short(requests[0][0], from_end=True) if requests else "",
                    **_answer(row, requests),
                }


def _answer(row: Mapping[str, Any], requests: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Returns what the page shows of an answer: options with their shares, or a text.

    Args:
        row: The sample.
        requests: The arguments of its requests. Those of options are a context and an option, and
            their answers a log-probability and whether the option is the likeliest text.
    """
    given, target = row.get("filtered_resps"), row.get("target")
    if isinstance(given, list) and _are_scores(given, requests):
        scores = [float(score) for score, _ in given]
        options = [str(request[1]) for request in requests]
        place = target if isinstance(target, int) and 0 <= target < len(options) else None
        if place is None and str(target) in (bare := [option.strip() for option in options]):
            place = bare.index(str(target))
        return {
            "shares": [round(share, 4) for share in shares(scores)],
            "choices": options,
            "choice": LETTERS[scores.index(max(scores))],
            "answer": _short(target) if place is None else LETTERS[place],
        }
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    return {"choice": _short(given), "answer": _short(target)}


def _are_scores(given: Sequence[Any], requests: Sequence[Any]) -> bool:
    """Returns whether each of some requests was answered by the score of an option."""
    return (
        1 < len(requests) <= len(LETTERS)
        and len(given) == len(requests)
        and all(isinstance(one, list | tuple) and len(one) == 2 for one in given)
    )


def _short(value: Any, *, from_end: bool = False) -> str:
    text = str(value)
    return text[-_SHOWN:] if from_end else text[:_SHOWN]
