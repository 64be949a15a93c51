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

    from glm3cli.data.preprocess.run import PreprocessProgress, Shown, Summary


def register(app: typer.Typer) -> None:
    """Adds `preprocess` to `app`."""

    @command(app, PreprocessConfig, "preprocess")
    def preprocess(config: PreprocessConfig) -> None:
        """Turn raw data into the token files that pretrain and finetune read.

        Reads parquet, jsonl, json, csv, arrow and txt (also .gz and .zst): files, folders, globs.
        A run that was killed goes on where it was when the same is run again.
        """
        from glm3cli.data.preprocess import run as core

        if config.preview:
            (_show_json if config.as_json else _show)(core.preview(config))
            return
        with progress_lines(config.log_interval) as report:
            summary = core.preprocess(config, report)
        errors = config.output_prefix.with_name(f"{config.output_prefix.name}.errors.jsonl")
        if config.on_error == "skip" and errors.exists():
            typer.echo(f"bad rows are listed in {errors}", err=True)
        if config.build_index:
            _build_indices(config, summary)
        _print_summary(summary, config.as_json)


def _build_indices(config: PreprocessConfig, summary: "Summary") -> None:
    """Builds the sample indices of every text file."""
    from pathlib import Path

    from glm3cli.data.prefixes import Blend
    from glm3cli.data.samples.datasets import DataSpec, build_index
    from glm3cli.data.tokens.tokenizer import Tokenizer

    assert config.seq_length is not None  # the config has checked it
    assert config.train_iters is not None
    for file in summary.files:
        if file.endswith(".idx"):
            blend = Blend((str(Path(file).with_suffix("")),), None)
            spec = DataSpec.of(config, blend, config.seq_length, config.train_iters)
            folder = build_index(spec, Tokenizer.load(config.tokenizer))
            typer.echo(f"sample indices are in {folder}", err=True)


def _print_summary(summary: "Summary", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(vars(summary), ensure_ascii=False))
        return
    more = f", {summary.skipped:,} skipped" if summary.skipped else ""
    more += f", {summary.truncated:,} cut" if summary.truncated else ""
    more += f", packs {summary.fill_rate:.2%} full" if summary.fill_rate else ""
    when = "before" if summary.repeated else f"in {summary.seconds:.1f} s"
    typer.echo(
        f"{summary.documents:,} documents, {summary.tokens:,} tokens, "
        f"{summary.bytes / 1e6:,.2f} MB of text {when}{more}"
    )
    for path in summary.files:
        typer.echo(path)


@contextmanager
def progress_lines(interval: int = 1000) -> "Iterator[Callable[[PreprocessProgress], None]]":
    """Shows progress on stderr: a bar on a terminal, else a line every `interval` documents."""
    if not sys.stderr.isatty():
        yield _line_reporter(interval)
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


def _line_reporter(interval: int) -> "Callable[[PreprocessProgress], None]":
    due, last = interval, time.monotonic()

    def report(progress: "PreprocessProgress") -> None:
        nonlocal due, last
        # A line per interval, but at fast speeds not more than one a second.
        if (progress.counts.documents >= due or progress.packed) and time.monotonic() - last >= 1:
            due, last = progress.counts.documents + interval, time.monotonic()
            typer.echo(f"{progress.done:4.0%}  {_speed(progress)}{_left(progress)}", err=True)

    return report


def _left(progress: "PreprocessProgress") -> str:
    """The time until all is read, at the speed so far."""
    if not progress.begun < progress.done < 1:
        return ""
    seconds = progress.seconds * (1 - progress.done) / (progress.done - progress.begun)
    return f"  {seconds:,.0f} s left"


def _speed(progress: "PreprocessProgress") -> str:
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


def _show_json(samples: "Iterator[Shown]") -> None:
    """Prints samples as JSON, one a line."""
    for sample in samples:
        tokens = [
            {"token": name, "id": token, "label": label} for name, token, label in sample.tokens
        ]
        typer.echo(json.dumps({"where": sample.where, "tokens": tokens}, ensure_ascii=False))


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
