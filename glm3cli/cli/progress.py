"""Shows on stderr how far a long command is: a bar on a terminal, otherwise a line now and then.

`bar_or_lines` decides which of the two; every command that shows progress uses it. `byte_progress`
serves conversions, `progress_lines` preprocessing. rich is imported only where a bar is drawn.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import typer

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from glm3cli.data.preprocess.writing.write import PreprocessProgress

State = TypeVar("State")
Unit = Literal["share", "count", "bytes"]

_SECONDS_BETWEEN_BYTE_LINES = 5.0
_SECONDS_BETWEEN_DOCUMENT_LINES = 1.0


@dataclass(frozen=True)
class Progress:
    """What a bar shows.

    Attributes:
        done: The amount of work that is done, in the bar's unit.
        total: The amount of work in all, in the bar's unit.
        text: The words beside the bar; None leaves them as they are.
    """

    done: float
    total: float
    text: str | None = None


@contextmanager
def bar_or_lines(
    to_bar: Callable[[State], Progress],
    to_lines: Callable[[State], None],
    unit: Unit,
    *,
    start: Progress | None = None,
    may_draw: bool = True,
) -> "Iterator[Callable[[State], None]]":
    """Gives a block a function to report its progress to, which shows it on stderr.

    Args:
        to_bar: Turns a reported state into what the bar shows. The bar begins anew when less is
            done than before.
        to_lines: Prints the line that a reported state calls for, if any; used instead of
            `to_bar` where stderr is no terminal.
        unit: How the bar writes the amount of work: a share of 1 as a percentage, a number of
            things, or a number of bytes. A bar of bytes vanishes when the block ends.
        start: What the bar shows at once; None draws it when the first state is reported.
        may_draw: Whether this process may draw a bar; if not, `to_lines` is used on terminals, too.
    """
    if not may_draw or not sys.stderr.isatty():
        yield to_lines
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    bar = Bar(*_columns(unit), console=Console(stderr=True), transient=unit == "bytes")
    task = bar.add_task("", total=None)

    def show(progress: Progress) -> None:
        if progress.done < bar.tasks[0].completed:
            bar.reset(task)
        bar.update(task, completed=progress.done, total=progress.total, description=progress.text)
        bar.start()  # does nothing if it was started before

    try:
        if start is not None:
            show(start)
        yield lambda state: show(to_bar(state))
    finally:
        bar.stop()


def _columns(unit: Unit) -> "tuple[ProgressColumn, ...]":
    """Returns the columns of a bar that counts in this unit."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    bar, text, left = BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    if unit == "bytes":
        return text, bar, DownloadColumn(), left
    if unit == "count":
        return bar, MofNCompleteColumn(), left, text
    return bar, TextColumn("{task.percentage:3.0f} %"), left, text


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Gives a block a function that takes what is done, the bytes done, and the bytes in all.

    Without a terminal, a line is printed every five seconds, and when a kind of work is complete.
    """
    with bar_or_lines(lambda state: state, _byte_lines(), "bytes") as show:
        yield lambda what, done, total: show(Progress(done, total, what))


def _byte_lines() -> Callable[[Progress], None]:
    """Returns a function that prints the lines of `byte_progress`."""
    begin = last = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal begin, last
        now = time.monotonic()
        if progress.done == 0:
            begin = last = now
        elif progress.done == progress.total or now - last > _SECONDS_BETWEEN_BYTE_LINES:
            last = now
            done, total = progress.done / 1e9, progress.total / 1e9
            line = f"{progress.text}: {done:.2f} of {total:.2f} GB, {now - begin:.0f} s"
            typer.echo(line, err=True)

    return report


@contextmanager
def progress_lines(interval: int = 1000) -> "Iterator[Callable[[PreprocessProgress], None]]":
    """Gives a block a function that takes the progress of preprocessing.

    Args:
        interval: The number of documents between two lines, where stderr is no terminal.
    """

    def to_bar(progress: "PreprocessProgress") -> Progress:
        return Progress(progress.done, 1.0, _speed(progress))

    start = Progress(0.0, 1.0, "")
    with bar_or_lines(to_bar, _document_lines(interval), "share", start=start) as report:
        yield report


def _document_lines(interval: int) -> "Callable[[PreprocessProgress], None]":
    """Returns a function that prints a line per `interval` documents, but at most one a second."""
    due, last = interval, time.monotonic()

    def report(progress: "PreprocessProgress") -> None:
        nonlocal due, last
        if progress.counts.documents < due and not progress.packed:
            return
        if time.monotonic() - last >= _SECONDS_BETWEEN_DOCUMENT_LINES:
            due, last = progress.counts.documents + interval, time.monotonic()
            typer.echo(f"{progress.done:4.0%}  {_speed(progress)}{_left(progress)}", err=True)

    return report


def _left(progress: "PreprocessProgress") -> str:
    """Returns the time until all input is read, at the speed so far; "" if it isn't known."""
    if not progress.begun < progress.done < 1:
        return ""
    seconds = progress.seconds * (1 - progress.done) / (progress.done - progress.begun)
    return f"  {seconds:,.0f} s left"


def _speed(progress: "PreprocessProgress") -> str:
    """Returns the amounts and speeds of preprocessing, as they are shown."""
    if progress.packed is not None:
        return f"packing: {progress.packed:.0%}"
    seconds, now, before = max(progress.seconds, 1e-9), progress.counts, progress.before
    text = (
        f"{now.documents:,} documents  "
        f"{(now.documents - before.documents) / seconds:,.0f} docs/s  "
        f"{(now.bytes - before.bytes) / seconds / 1e6:.1f} MB/s  "
        f"{(now.tokens - before.tokens) / seconds:,.0f} tokens/s"
    )
    return text + (f"  {now.skipped:,} skipped" if now.skipped else "")
