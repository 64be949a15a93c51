"""`glm3 preprocess`: its options and the printed result."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from glm3cli.cli.epilogs import PREPROCESS
from glm3cli.cli.options import command
from glm3cli.cli.progress import progress_lines
from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.errors import DataError

if TYPE_CHECKING:
    from glm3cli.data.preprocess.run import PreviewSample
    from glm3cli.data.preprocess.writing.write import Summary

_SHOWN_FILES = 5  # of the input files that could not be read whole


def register(app: typer.Typer) -> None:
    """Adds `preprocess` to `app`."""

    @command(app, PreprocessConfig, "preprocess", epilog=PREPROCESS)
    def preprocess(config: PreprocessConfig) -> None:
        """Turn raw data into the token files that pretrain and finetune read.

        Reads parquet, jsonl, json, csv, tsv, arrow and txt, also compressed: files, folders, globs.
        A run that was killed goes on where it was when the same is run again.
        """
        from glm3cli.data.preprocess import run as core

        if config.preview:
            (_show_json if config.as_json else _show)(core.preview(config))
            return
        with progress_lines(config.log_interval) as report:
            summary = core.preprocess(config, report)
        errors = config.prefix.with_name(f"{config.prefix.name}.errors.jsonl")
        if (config.on_error == "skip" or config.merge) and errors.exists():
            typer.echo(f"bad rows are listed in {errors}", err=True)
        if config.build_index:
            _build_indices(config, summary)
        _print_summary(summary, config.as_json)
        if config.part:
            _, count = config.part_numbers
            typer.echo(
                f"this is part {config.part}; with all {count} here: glm3 preprocess --merge "
                f"{config.output_prefix}-part-*-of-{count} --output-prefix {config.output_prefix}",
                err=True,
            )
        _check_nothing_lost(summary)


def _build_indices(config: PreprocessConfig, summary: "Summary") -> None:
    """Builds the sample indices of every text file."""
    from pathlib import Path

    from glm3cli.data.prefixes import Blend
    from glm3cli.data.samples.datasets import build_index
    from glm3cli.data.samples.spec import DataSpec
    from glm3cli.data.tokens.tokenizer import Tokenizer

    assert config.seq_length is not None  # the config has checked it
    assert config.train_iters is not None
    for file in summary.files:
        if file.endswith(".idx"):
            blend = Blend((str(Path(file).with_suffix("")),), None)
            spec = DataSpec.of(config, blend, config.seq_length, config.train_iters)
            folder = build_index(spec, Tokenizer.load(config.tokenizer_path))
            typer.echo(f"sample indices are in {folder}", err=True)


def _print_summary(summary: "Summary", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(vars(summary), ensure_ascii=False))
        return
    more = f", {summary.skipped:,} skipped" if summary.skipped else ""
    more += f" ({summary.equal:,} of two equal answers)" if summary.equal else ""
    more += f", {summary.truncated:,} cut" if summary.truncated else ""
    more += f", packs {summary.fill_rate:.2%} full" if summary.fill_rate else ""
    when = "before" if summary.repeated else f"in {summary.seconds:.1f} s"
    typer.echo(
        f"{summary.documents:,} documents, {summary.tokens:,} tokens, "
        f"{summary.bytes / 1e6:,.2f} MB of text {when}{more}"
    )
    for path in summary.files:
        typer.echo(path)


def _check_nothing_lost(summary: "Summary") -> None:
    """Raises DataError if an input could not be read whole, though the files hold the rest."""
    if not summary.lost:
        return
    files = [
        f"{path} ({'an unknown part' if share is None else f'{share:.1%}'} is lost)"
        for path, share in summary.lost.items()
    ]
    more = f" and {len(files) - _SHOWN_FILES:,} more" if len(files) > _SHOWN_FILES else ""
    raise DataError(
        f"not all input could be read: {', '.join(files[:_SHOWN_FILES])}{more}; the output holds "
        "the rest",
        "fetch or mend the files, and run the same again",
    )


def _show_json(samples: "Iterator[PreviewSample]") -> None:
    """Prints samples as JSON, one a line."""
    for sample in samples:
        tokens = [
            {"token": name, "id": token, "label": label} for name, token, label in sample.tokens
        ]
        typer.echo(json.dumps({"where": sample.where, "tokens": tokens}, ensure_ascii=False))


def _show(samples: "Iterator[PreviewSample]") -> None:
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
