"""Writes results.html beside the JSON file of a result."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from glm3cli.evals.page import parts
from glm3cli.evals.results import EvalResult, QuestionResult, Tally, is_right
from glm3cli.evals.suite import LETTERS, Question
from glm3cli.host.files import write_text

Section = tuple[str, str]  # a heading, and HTML below it

_FILTERS = """
<div class="filters"><button data-kind="all" aria-pressed="true">all</button>
<button data-kind="right" aria-pressed="false">right</button>
<button data-kind="wrong" aria-pressed="false">wrong</button>
<select id="subject"><option value="">all subjects</option></select>
<input id="search" placeholder="search" aria-label="search"><span class="note" id="count"></span>
</div><div class="card" id="list" style="max-height:none"></div>
<div class="filters" style="margin-top:10px"><button id="more" hidden></button></div>
"""


def page_of(output: Path) -> Path:
    """Returns the path of the page that belongs to a JSON file."""
    return output.with_suffix(".html")


def write_page(
    output: Path,
    title: str,
    about: str,
    tiles: Mapping[str, str | None],
    sections: Sequence[Section],
    notes: Iterable[str] = (),
    questions: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes the page of a result.

    Args:
        output: The JSON file of the result.
        title: The title.
        about: The line below it.
        tiles: Numbers by their names.
        sections: The headings, each with the HTML below it.
        notes: Sentences on how to read the result.
        questions: What the script shows of each question.
        settings: The settings and versions of the run.
    """
    more: list[Section] = [("Questions", _FILTERS)] if questions else []
    if settings:
        told = [(name, str(value)) for name, value in settings.items() if value is not None]
        more.append(("Settings", parts.table([], told)))
    template = Path(__file__).with_name("results.html").read_text("utf-8")
    page = Template(template).substitute(
        title=escape(title),
        about=escape(about),
        tiles=parts.tiles(tiles),
        notes="".join(f'<p class="note">{escape(note)}</p>' for note in notes),
        sections="".join(f"<h2>{escape(head)}</h2>{body}" for head, body in [*sections, *more]),
        questions=parts.data(list(questions)),
    )
    write_text(page_of(output), page)


def write_result(
    output: Path, result: EvalResult, asked: Iterable[Question], notes: Iterable[str]
) -> None:
    """Writes the page of a benchmark.

    Args:
        output: The JSON file of the result.
        result: Its content.
        asked: The questions, in the order of the result.
        notes: Sentences on how to read the result.
    """
    questions = result["questions"]
    low, high = result["interval"]
    clustered = result["interval_clustered"]
    tiles = {
        "accuracy (micro)": f"{result['micro']:.2%}",
        "95 % interval": f"{low:.2%} to {high:.2%}",
        "by subjects": None if clustered is None else f"{clustered[0]:.2%} to {clustered[1]:.2%}",
        "macro average": f"{result['macro']:.2%}",
        "questions": f"{len(questions):,}",
        "smallest difference shown": f"{result['smallest_difference']:.2%}",
    }
    sections = [
        ("Categories", _tally_bars(result["categories"], questions)),
        ("Subjects", _tally_bars(result["subjects"], questions)),
    ]
    lettered = [one for one in questions if one["scores"]]
    if lettered:
        drawing, error = parts.calibration(
            [(max(shares(q["scores"])), is_right(q)) for q in lettered]
        )
        tiles["calibration error"] = f"{error:.2%}"
        sections.append(("Confidence and letters", _confidence(drawing, lettered)))
    if "rotations" in result:
        sections.append(("Options in other places", _rotations(result)))
    write_page(
        output,
        title=f"{result['benchmark']}, {result['protocol']} protocol, {result['shots']}-shot",
        about=f"{result['settings'].get('model', '')} · prompts {result['prompt_sha256'][:16]}",
        tiles=tiles,
        sections=sections,
        notes=notes,
        questions=[_row(one, question) for one, question in zip(questions, asked, strict=True)],
        settings=result["settings"] | result["versions"],
    )


def shares(scores: Sequence[float]) -> list[float]:
    """Returns the probability of each letter among the letters, given their log-probabilities."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def _tally_bars(tallies: Mapping[str, Tally], questions: Sequence[QuestionResult]) -> str:
    """Returns bars of accuracies, with a line where guessing would be."""
    found = [
        parts.Bar(
            name,
            one["accuracy"],
            f"{one['accuracy']:.1%}  {one['correct']:,} of {one['total']:,}",
            one["interval"],
        )
        for name, one in tallies.items()
    ]
    chances = [1 / len(one["scores"]) for one in questions if one["scores"]]
    return parts.bars(found, sum(chances) / len(chances) if chances else None)


def _confidence(drawing: str, questions: Sequence[QuestionResult]) -> str:
    """Returns the calibration, and how often each letter was chosen and would have been right."""
    count = max(len(one["scores"]) for one in questions)
    chosen = [one["choice"] for one in questions]
    right = [one["answer"] for one in questions]
    found = [
        parts.Bar(
            letter,
            chosen.count(letter) / len(chosen),
            f"chosen {chosen.count(letter) / len(chosen):.1%}, right "
            f"{right.count(letter) / len(right):.1%}",
            other=right.count(letter) / len(right),
        )
        for letter in LETTERS[:count]
    ]
    text = "The upper bar: how often the letter was chosen; the lower one: how often it was right."
    return (
        f'<div class="two"><section class="card">{drawing}</section><section>'
        f'{parts.bars(found)}<p class="note">{text}</p></section></div>'
    )


def _rotations(result: EvalResult) -> str:
    """Returns the accuracies with the options moved up by so many places."""
    found = result["rotations"]
    told = [
        parts.Bar(f"moved by {place}" if place else "as in the file", value, f"{value:.1%}")
        for place, value in enumerate(found["accuracies"])
    ]
    return (
        parts.bars(told) + f'<p class="note">The same option at all places: '
        f"{found['consistent']:.1%}; right at all places: {found['always_right']:.1%}.</p>"
    )


def _row(one: QuestionResult, question: Question) -> dict[str, Any]:
    """Returns what the page shows of a question."""
    row: dict[str, Any] = {
        "subject": one["subject"],
        "index": one["index"],
        "right": is_right(one),
        "choice": one["choice"],
        "answer": one["answer"],
        "text": question.text,
    }
    if one["scores"]:
        row |= {"shares": [round(share, 4) for share in shares(one["scores"])]}
        row |= {"choices": list(question.choices)}
    return row
