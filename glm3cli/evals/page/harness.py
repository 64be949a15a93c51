"""Writes the page of a run of lm-evaluation-harness."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glm3cli.evals.page import parts
from glm3cli.evals.page.write import write_page

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
                yield {
                    "subject": task,
                    "index": row.get("doc_id", 0),
                    "right": bool(found[0]),
                    "choice": _short(row.get("filtered_resps")),
                    "answer": _short(row.get("target")),
                    "text": _prompt(row.get("arguments")),
                }


def _prompt(arguments: Any) -> str:
    """Returns the end of a prompt, given the arguments of its first request."""
    first = arguments
    while isinstance(first, list | tuple | dict) and first:
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    return str(first)[-_SHOWN:]


def _short(value: Any) -> str:
    return str(value)[:_SHOWN]
