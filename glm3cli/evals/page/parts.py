"""The parts of results.html: tiles, bars with intervals, a calibration curve, a grid, tables."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from glm3cli.evals.statistics import Interval

_SIZE = 260  # of the calibration's drawing, in its own coordinates


@dataclass(frozen=True)
class Bar:
    """One bar of a chart.

    Attributes:
        name: What it stands for.
        value: Its length, from 0 to 1.
        told: The number as it is shown.
        interval: The 95 % interval of the value; None for none.
        other: A second value, which is drawn below the first one; None for none.
    """

    name: str
    value: float
    told: str
    interval: Interval | None = None
    other: float | None = None


def tiles(values: Mapping[str, str | None]) -> str:
    """Returns numbers with their names; those that are None are left out."""
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in values.items()
        if value is not None
    )


def bars(found: Sequence[Bar], mark: float | None = None) -> str:
    """Returns bars with their intervals, one below the other.

    Args:
        found: The bars.
        mark: A value at which every bar has a line, such as that of guessing; None for none.
    """
    line = "" if mark is None else f'<i class="mark" style="left:{mark:.2%}"></i>'
    rows = []
    for bar in found:
        second, reach = "", ""
        if bar.other is not None:
            second = f'<i class="fill second" style="width:{bar.other:.2%}"></i>'
        if bar.interval is not None:
            low, high = bar.interval
            reach = f'<i class="reach" style="left:{low:.2%};width:{high - low:.2%}"></i>'
        kind = "track" if bar.other is None else "track two"
        rows.append(
            f'<div class="row"><span class="name">{escape(bar.name)}</span>'
            f'<span class="{kind}"><i class="fill" style="width:{bar.value:.2%}"></i>'
            f'{second}{reach}{line}</span><span class="told">{escape(bar.told)}</span></div>'
        )
    return f'<div class="card bars">{"".join(rows)}</div>'


def differences(found: Sequence[tuple[str, float, str]]) -> str:
    """Returns bars that go from the middle to the right or to the left.

    Args:
        found: The name, the difference from -1 to 1, and the text of each bar.
    """
    widest = max((abs(value) for _, value, _ in found), default=0.0) or 1.0
    rows = []
    for name, value, told in found:
        width = abs(value) / widest / 2
        left = 0.5 if value >= 0 else 0.5 - width
        kind = "better" if value >= 0 else "worse"
        rows.append(
            f'<div class="row"><span class="name">{escape(name)}</span><span class="track">'
            f'<i class="fill {kind}" style="left:{left:.2%};width:{width:.2%}"></i>'
            f'<i class="mark" style="left:50%"></i></span>'
            f'<span class="told">{escape(told)}</span></div>'
        )
    return f'<div class="card bars">{"".join(rows)}</div>'


def calibration(pairs: Sequence[tuple[float, bool]], num_bins: int = 10) -> tuple[str, float]:
    """Draws how often answers are right that the model gives with some confidence.

    Args:
        pairs: The probability of each chosen answer, and whether it is right.
        num_bins: The number of bins of equal width.

    Returns:
        The drawing, and the expected calibration error: the mean distance between confidence and
        share of right answers of a bin, weighted by its answers (Guo et al. 2017).
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(num_bins)]
    for confidence, right in pairs:
        bins[min(num_bins - 1, int(confidence * num_bins))].append((confidence, right))
    error, dots = 0.0, []
    for one in bins:
        if not one:
            continue
        confidence = sum(c for c, _ in one) / len(one)
        share = sum(right for _, right in one) / len(one)
        error += abs(confidence - share) * len(one) / len(pairs)
        radius = 3 + 9 * (len(one) / len(pairs)) ** 0.5
        dots.append(
            f'<circle cx="{confidence * _SIZE:.1f}" cy="{(1 - share) * _SIZE:.1f}" '
            f'r="{radius:.1f}"><title>{len(one):,} answers: confidence {confidence:.1%}, '
            f"right {share:.1%}</title></circle>"
        )
    labels = "".join(
        f'<text x="{at * _SIZE:.0f}" y="{_SIZE + 16}">{at:.0%}</text>'
        f'<text x="-8" y="{(1 - at) * _SIZE + 4:.0f}" class="y">{at:.0%}</text>'
        for at in (0, 0.25, 0.5, 0.75, 1)
    )
    drawing = (
        f'<svg class="calibration" viewBox="-44 -14 {_SIZE + 64} {_SIZE + 50}" role="img" '
        f'aria-label="Calibration"><path class="ideal" d="M0 {_SIZE}L{_SIZE} 0"/>'
        f'<path class="axes" d="M0 0V{_SIZE}H{_SIZE}"/>{"".join(dots)}{labels}'
        f'<text x="{_SIZE / 2:.0f}" y="{_SIZE + 32}">confidence</text></svg>'
    )
    return drawing, error


def grid(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], corner: str) -> str:
    """Returns shares as a table whose cells are coloured by them.

    Args:
        columns: The names of the columns.
        rows: The name of each row, and its shares.
        corner: What the names of rows and columns stand for.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f'<td style="--share:{share:.3f}">{share:.0%}</td>' for share in shares)
        + "</tr>"
        for name, shares in rows
    )
    return (
        f'<div class="card"><table class="grid"><thead><tr><th>{escape(corner)}</th>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table, whose cells are escaped; the head may be empty."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{row(head, 'th')}</thead>" if head else ""
    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="card"><table>{top}<tbody>{body}</tbody></table></div>'


def data(rows: Any) -> str:
    """Returns what the script reads, as JSON that no text in it can end."""
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
