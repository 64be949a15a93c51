"""`glm3 preprocess`: options, progress and the printed result."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from glm3cli.cli.options import command
from glm3cli.config.preprocess import PreprocessConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from glm3cli.data.preprocess import Progress, Shown, Summary


def register(app: typer.Typer) -> None:
    """Adds `preprocess` to `app`."""

    @command(app, PreprocessConfig, "preprocess")
    def preprocess(config: PreprocessConfig) -> None:
        """Turn raw data into the token files that pretrain and finetune read.

        Reads parquet, jsonl, json, csv, arrow and txt (also .gz and .zst): files, folders, globs.
        """
        from glm3cli.data import preprocess as core

        if config.preview:
            _show(core.preview(config))
            return
        with _reporter(config) as report:
            summary = core.preprocess(config, report)
        errors = config.output_prefix.with_name(f"{config.output_prefix.name}.errors.jsonl")
        if config.on_error == "skip" and errors.exists():
            typer.echo(f"bad rows are listed in {errors}", err=True)
        _print_summary(summary, config.as_json)


def _print_summary(summary: "Summary", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(vars(summary), ensure_ascii=False))
        return
    skipped = f", {summary.skipped:,} skipped" if summary.skipped else ""
    typer.echo(
        f"{summary.documents:,} documents, {summary.tokens:,} tokens, "
        f"{summary.bytes / 1e6:,.2f} MB of text in {summary.seconds:.1f} s{skipped}"
    )
    for path in summary.files:
        typer.echo(path)


@contextmanager
def _reporter(config: PreprocessConfig) -> "Iterator[Callable[[Progress], None]]":
    """Shows progress on stderr: a bar on a terminal, otherwise lines."""
    if not sys.stderr.isatty():
        yield _line_reporter(config.log_interval)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda progress: bar.update(
            task, completed=progress.done, description=_speed(progress)
        )


def _line_reporter(interval: int) -> "Callable[[Progress], None]":
    due, last = interval, time.monotonic()

    def report(progress: "Progress") -> None:
        nonlocal due, last
        # A line per interval, but at fast speeds not more than one a second.
        if progress.documents >= due and time.monotonic() - last >= 1:
            due, last = progress.documents + interval, time.monotonic()
            typer.echo(f"{progress.done:4.0%}  {_speed(progress)}", err=True)

    return report


def _speed(progress: "Progress") -> str:
    seconds = max(progress.seconds, 1e-9)
    text = (
        f"{progress.documents:,} documents  {progress.documents / seconds:,.0f} docs/s  "
        f"{progress.bytes / seconds / 1e6:.1f} MB/s  {progress.tokens / seconds:,.0f} tokens/s"
    )
    return text + (f"  {progress.skipped:,} skipped" if progress.skipped else "")


def _show(samples: "Iterator[Shown]") -> None:
    """Prints samples, one token a line: spelling, id, label; trained ones in colour."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for sample in samples:
        console.print(Text(sample.where, style="bold"), soft_wrap=True)
        for name, token, label in sample.tokens:
            trained = label is None or label >= 0
            shown = "" if label is None else str(label)
            console.print(
                Text(f"{token:>6} {shown:>6}  {name!r}", style="green" if trained else "dim"),
                soft_wrap=True,
            )
