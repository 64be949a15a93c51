"""Draws curves as inline SVG, with axes and marks of events.

A curve that has more points than pixels is drawn in buckets of neighbouring points. The browser
stretches a drawing to its place on the page; the labels stand beside it as HTML, so that they keep
their size. The drawn numbers go along as JSON, from which the page shows those under the pointer.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

from glm3cli.train.report.history import Event, Values

WIDTH, HEIGHT = 1000.0, 240.0  # of the drawing's own coordinates
MAX_BUCKETS = 500
NUM_COLOURS = 6  # of the page's style: c0 to c5


class Bucket(NamedTuple):
    """Neighbouring points of a curve that are drawn as one.

    Attributes:
        iteration: The iteration of the last of the points.
        low: The smallest of their values.
        mean: The mean of their values.
        high: The largest of their values.
    """

    iteration: int
    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: The name in the chart's legend.
        iterations: The iteration of each point, in increasing order.
        values: The value of each point; None where there is none.
    """

    name: str
    iterations: Sequence[int]
    values: Values

    def parts(self) -> list[list[Bucket]]:
        """Returns the buckets of the curve, in parts that are drawn apart.

        There are at most MAX_BUCKETS in all; where there are no more points, each is a bucket of
        its own. A bucket keeps the extremes of its points, so that no spike is lost. One without a
        value ends a part: a line over the gap would be made up.
        """
        size = max(1, math.ceil(len(self.iterations) / MAX_BUCKETS))
        parts: list[list[Bucket]] = [[]]
        for start in range(0, len(self.iterations), size):
            values = [v for v in self.values[start : start + size] if v is not None]
            last = self.iterations[start : start + size][-1]
            if values:
                mean = sum(values) / len(values)
                parts[-1].append(Bucket(last, min(values), mean, max(values)))
            elif parts[-1]:
                parts.append([])
        return [part for part in parts if part]


@dataclass(frozen=True)
class Axis:
    """An axis of a chart, which places values between its two ends.

    Attributes:
        low: The value at the low end.
        high: The value at the high end.
        is_log: Whether the axis is logarithmic.
    """

    low: float
    high: float
    is_log: bool = False

    @classmethod
    def of(cls, values: Sequence[float], *, from_zero: bool, may_log: bool) -> "Axis":
        """Returns an axis that has room for all values.

        Args:
            values: The values; at least one.
            from_zero: Whether a linear axis has to include zero.
            may_log: Whether the axis is logarithmic if the values are positive and span more than
                two powers of ten.
        """
        low, high = min(values), max(values)
        if may_log and low > 0 and high / low > 100:
            return cls(low / 1.3, high * 1.3, is_log=True)
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        margin = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
        return cls(low if from_zero and low == 0 else low - margin, high + margin)

    def place(self, value: float) -> float:
        """Returns the place of a value on the axis: 0 at its low end, 1 at its high one."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / ((self.high - self.low) or 1.0)

    def ticks(self, about: int) -> list[float]:
        """Returns round values on the axis, evenly spaced; the powers of ten if it is logarithmic.

        Args:
            about: The number of ticks to aim at on a linear axis.
        """
        if self.is_log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1)]
        rough = ((self.high - self.low) or 1.0) / about
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Chart:
    """A drawing of curves that share their axes.

    Attributes:
        title: The title.
        curves: The curves; a legend names them if there are several.
        from_zero: Whether a linear axis of values includes zero, so that heights compare.
        may_log: Whether positive values that span more than two powers of ten get a logarithmic
            axis.
        marks: The events that are marked by vertical lines.
    """

    title: str
    curves: Sequence[Curve]
    from_zero: bool = True
    may_log: bool = False
    marks: Sequence[Event] = field(default=())

    def html(self, iterations: Axis) -> str:
        """Returns an HTML figure; an empty text if no curve has a value.

        Args:
            iterations: The horizontal axis.
        """
        drawn = [(curve.name, curve.parts()) for curve in self.curves]
        ends = [
            end for _, parts in drawn for part in parts for b in part for end in (b.low, b.high)
        ]
        if not ends:
            return ""
        axis = Axis.of(ends, from_zero=self.from_zero, may_log=self.may_log)
        grid, labels = _grid(axis, iterations)
        paths = [_curve(index, parts, iterations, axis) for index, (_, parts) in enumerate(drawn)]
        return (
            f"<figure><figcaption>{escape(self.title)}{_legend(self.curves)}</figcaption>"
            f'<div class="plot"><svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" preserveAspectRatio="none"'
            f' role="img" aria-label="{escape(self.title)}">{grid}{_marks(self.marks, iterations)}'
            f"{''.join(paths)}</svg>{labels}"
            f'<script type="application/json">{_numbers(drawn, iterations)}</script>'
            "</div></figure>"
        )


def number(value: float) -> str:
    """Returns a number in four significant digits, with k, M, G or T behind a large one."""
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if sign == 'k' else size):.4g}{sign}"
    return f"{value:.4g}"


def _curve(index: int, parts: list[list[Bucket]], iterations: Axis, axis: Axis) -> str:
    """Returns the SVG paths of a curve: a line, and a band between the extremes of its buckets.

    Args:
        index: The index of the curve in its chart, which determines its colour; after NUM_COLOURS
            curves the colours begin again.
        parts: The parts of the curve.
        iterations: The horizontal axis.
        axis: The vertical axis.
    """

    def at(bucket: Bucket, value: float) -> str:
        x, y = iterations.place(bucket.iteration) * WIDTH, (1 - axis.place(value)) * HEIGHT
        return f"{x:.2f},{y:.2f}"

    colour = f"c{index % NUM_COLOURS}"
    paths = []
    for part in parts:
        if any(bucket.low != bucket.high for bucket in part):
            around = [at(bucket, bucket.high) for bucket in part]
            around += [at(bucket, bucket.low) for bucket in reversed(part)]
            paths.append(f'<path class="band {colour}" d="M{"L".join(around)}Z"/>')
        line = "L".join(at(bucket, bucket.mean) for bucket in part)
        # A step without neighbours is a dot: a line of no length with round ends.
        paths.append(f'<path class="line {colour}" d="M{line}{"h0" * (len(part) == 1)}"/>')
    return "".join(paths)


def _grid(axis: Axis, iterations: Axis) -> tuple[str, str]:
    """Returns the horizontal lines at the ticks as SVG, and the labels of both axes as HTML."""
    lines, labels = [], []
    for tick in axis.ticks(4):
        place = 1 - axis.place(tick)
        y = place * HEIGHT
        lines.append(f'<path class="grid" d="M0,{y:.2f}H{WIDTH:g}"/>')
        labels.append(f'<span class="y" style="top:{place:.2%}">{number(tick)}</span>')
    for tick in iterations.ticks(6):
        if tick == int(tick):
            left = f"left:{iterations.place(tick):.2%}"
            labels.append(f'<span class="x" style="{left}">{number(tick)}</span>')
    return "".join(lines), "".join(labels)


def _marks(events: Sequence[Event], iterations: Axis) -> str:
    """Returns a vertical line for each event as SVG; lines of a kind that coincide are one."""
    places = {
        (event.kind, round(iterations.place(event.iteration) * MAX_BUCKETS)): event
        for event in events
        if iterations.low <= event.iteration <= iterations.high
    }
    return "".join(
        f'<path class="mark {escape(kind)}" '
        f'd="M{iterations.place(event.iteration) * WIDTH:.2f},0V{HEIGHT:g}">'
        f"<title>{escape(kind)} at {event.iteration}</title></path>"
        for (kind, _), event in places.items()
    )


def _legend(curves: Sequence[Curve]) -> str:
    """Returns the names of the curves as HTML; an empty text for a single curve."""
    if len(curves) == 1:
        return ""
    return "".join(
        f'<span class="key c{index % NUM_COLOURS}">{escape(curve.name)}</span>'
        for index, curve in enumerate(curves)
    )


def _numbers(drawn: list[tuple[str, list[list[Bucket]]]], iterations: Axis) -> str:
    """Returns the drawn buckets as JSON, for the script that shows the values under the pointer.

    Args:
        drawn: The name and the parts of each curve.
        iterations: The horizontal axis.
    """
    curves = []
    for name, parts in drawn:
        buckets = [bucket for part in parts for bucket in part]
        values = {
            key: [float(f"{getattr(bucket, key):.7g}") for bucket in buckets]
            for key in ("low", "mean", "high")
        }
        curves.append({"name": name, "iteration": [b.iteration for b in buckets], **values})
    text = json.dumps({"from": iterations.low, "to": iterations.high, "curves": curves})
    return text.replace("<", "\\u003c")  # no name may end the script
