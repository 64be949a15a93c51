"""`glm3 eval`: scores a model on benchmarks, and by lm-evaluation-harness."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from glm3cli.cli.epilogs import COMPARE, CUSTOM, EVAL, HARNESS, NEEDLE
from glm3cli.cli.options import command, flowing
from glm3cli.cli.progress import Progress, bar_or_lines
from glm3cli.config.evaluation import (
    CompareConfig,
    CustomConfig,
    EvalConfig,
    HarnessConfig,
    MmluConfig,
    NeedleConfig,
    QuestionOptions,
)
from glm3cli.parallel.launch import is_speaker

if TYPE_CHECKING:
    from rich.table import Table

    from glm3cli.evals.ledger import Report, Status
    from glm3cli.evals.results import Comparison, EvalResult, Tally
    from glm3cli.evals.suite import Suite

app = typer.Typer(no_args_is_help=True, help="Score a model on benchmarks.", epilog=flowing(EVAL))


@command(app, MmluConfig, "mmlu", epilog=EVAL)
def mmlu(config: MmluConfig) -> None:
    """Score a model on MMLU: DIR has test/*_test.csv and dev/*_dev.csv.

    glm3 eval mmlu --model MODEL --data-dir mmlu/data
    """
    from glm3cli.evals.suites.mmlu import suite_of

    _evaluate(config, suite_of(config.protocol))


@command(app, EvalConfig, "ceval", epilog=EVAL)
def ceval(config: EvalConfig) -> None:
    """Score a model on C-Eval: DIR has val/*_val.csv (whose answers are public) and dev/*_dev.csv.

    glm3 eval ceval --model MODEL --data-dir ceval-exam
    """
    from glm3cli.evals.suites.ceval import CEVAL

    _evaluate(config, CEVAL)


@command(app, EvalConfig, "cmmlu", epilog=EVAL)
def cmmlu(config: EvalConfig) -> None:
    """Score a model on CMMLU: DIR has test/*.csv and dev/*.csv.

    glm3 eval cmmlu --model MODEL --data-dir cmmlu
    """
    from glm3cli.evals.suites.cmmlu import CMMLU

    _evaluate(config, CMMLU)


@command(app, CustomConfig, "custom", epilog=CUSTOM + EVAL)
def custom(config: CustomConfig) -> None:
    """Score a model on questions of your own, with choices or with an answer to match.

    glm3 eval custom questions.jsonl --model MODEL
    """
    from glm3cli.evals.custom import run_custom

    found = run_custom(config, _display)
    if found is not None:
        _print_result(config, *found)


@command(app, NeedleConfig, "needle", epilog=NEEDLE)
def needle(config: NeedleConfig) -> None:
    """Ask a model for facts in long texts, up to its positions: shows rotary errors.

    glm3 eval needle --model MODEL
    """
    from glm3cli.evals.needle import run_needle

    result = run_needle(config, _display)
    if result is None or not is_speaker():
        return
    if config.as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    for length, share in result["lengths"].items():
        typer.echo(f"{int(length):>9,} tokens  {share:7.2%} found")
    low, high = result["interval"]
    typer.echo(f"      all lengths  {result['micro']:7.2%} found, 95 % {low:.2%} to {high:.2%}")
    _echo_files(config.output)


@command(app, CompareConfig, "compare", epilog=COMPARE)
def compare(config: CompareConfig) -> None:
    """Compare two results of the same questions: is the difference more than chance?

    glm3 eval compare base.json tuned.json
    """
    from glm3cli.evals.compare import run_compare

    found = run_compare(config)
    if config.as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        _print_comparison(found)
        _echo_files(config.output)


@command(app, HarnessConfig, "harness", epilog=HARNESS)
def harness(config: HarnessConfig) -> None:
    """Score a model on tasks of lm-evaluation-harness (pip install 'glm3[eval]').

    glm3 eval harness --model MODEL --tasks gsm8k,boolq
    """
    from glm3cli.evals.harness.run import run_harness

    found = run_harness(config, quiet=not (sys.stderr.isatty() and is_speaker()))
    if found is not None:
        result, table = found
        typer.echo(json.dumps(result, ensure_ascii=False) if config.as_json else table)
        if not config.as_json:
            _echo_files(config.output)


def _evaluate(config: EvalConfig, suite: "Suite") -> None:
    """Runs a benchmark, and prints its result as JSON or as a table."""
    from glm3cli.evals.runner import run_benchmark

    result = run_benchmark(config, suite, _display)
    if result is not None:
        _print_result(config, result, suite)


def _print_result(config: QuestionOptions, result: "EvalResult", suite: "Suite") -> None:
    """Prints the result of a benchmark on rank 0."""
    if not is_speaker():
        return
    if config.as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    _print_tables(result, suite)
    _echo_files(config.output)


def _echo_files(output: Path) -> None:
    """Says where a result is."""
    from glm3cli.evals.page.write import page_of

    typer.echo(f"written to {output} and {page_of(output)}", err=True)


@contextmanager
def _display(total: int) -> "Iterator[Report]":
    """Shows the progress of a benchmark on stderr: a bar on a terminal, else a line per subject.

    Args:
        total: The number of questions.

    Yields:
        A function that shows a status.
    """

    def to_bar(status: "Status") -> Progress:
        lines = [_line(name, tally) for name, tally in status.finished.items()]
        return Progress(status.done, status.total, lines[-1] if lines else None)

    last: Status | None = None
    start = Progress(0, total, "")
    with bar_or_lines(to_bar, _report_line, "count", start=start, may_draw=is_speaker()) as report:

        def show(status: "Status") -> None:
            nonlocal last
            last = status
            report(status)

        yield show
    if last is not None:
        typer.echo(_speed(last), err=True)


def _report_line(status: "Status") -> None:
    """Prints a line for each subject that has just been finished."""
    for name, tally in status.finished.items():
        done = f"{status.done:,} of {status.total:,} questions{_left(status)}"
        typer.echo(f"{_line(name, tally)}  [{done}]", err=True)


def _left(status: "Status") -> str:
    """Returns the time until all questions are answered, at the speed so far."""
    asked, left = status.done - status.known, status.total - status.done
    return f", {left * status.seconds / asked:,.0f} s left" if asked and left else ""


def _speed(status: "Status") -> str:
    """Returns how fast questions were answered."""
    asked, seconds = status.done - status.known, max(status.seconds, 1e-9)
    if not asked or not status.seconds:
        return f"{status.done:,} questions"
    return (
        f"{asked:,} questions in {seconds:,.1f} s: {asked / seconds:,.1f} questions/s, "
        f"{status.model_seconds / seconds:.0%} of the time in the model"
    )


def _line(name: str, tally: "Tally") -> str:
    """Returns the name and the accuracy of a subject as text."""
    return f"{name}: {tally['accuracy']:.2%} ({tally['correct']} of {tally['total']})"


def _print_tables(result: "EvalResult", suite: "Suite") -> None:
    """Prints a table of subjects, categories and averages, and notes on how to read it."""
    from rich.console import Console
    from rich.table import Table

    from glm3cli.evals.summary import notes_of

    title = f"{result['benchmark']}, {result['protocol']} protocol, {result['shots']}-shot"
    table = Table("", "correct", "of", "accuracy", "± stderr", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    _add_rows(table, result["subjects"])
    _add_rows(table, result["categories"])
    total = len(result["questions"])
    correct = sum(one["correct"] for one in result["subjects"].values())
    shown = (f"{correct:,}", f"{total:,}", f"{result['micro']:.2%}", f"{result['stderr']:.2%}")
    table.add_row("micro average (over questions)", *shown, style="bold")
    table.add_row("macro average (over subjects)", "", "", f"{result['macro']:.2%}", "")
    # A pipe has no width: nothing may be cut there.
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    for note in notes_of(result, suite):
        console.print(note, soft_wrap=True, highlight=False, markup=False)


def _add_rows(table: "Table", tallies: "Mapping[str, Tally]") -> None:
    """Adds a row for each subject or category to a table, and a line below them."""
    for name, one in tallies.items():
        accuracy = (f"{one['accuracy']:.2%}", f"{one['stderr']:.2%}")
        table.add_row(name, f"{one['correct']:,}", f"{one['total']:,}", *accuracy)
    table.add_section()


def _print_comparison(found: "Comparison") -> None:
    """Prints the difference of two results, by subject."""
    from rich.console import Console
    from rich.table import Table

    title = f"{found['of']}: {found['first']['file']} and {found['second']['file']}"
    table = Table("", "of", "first", "second", "difference", "gained", "lost", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, one in found["subjects"].items():
        shares = (f"{one['first']:.2%}", f"{one['second']:.2%}", f"{one['difference']:+.2%}")
        counts = (f"{one['only_second']:,}", f"{one['only_first']:,}")
        table.add_row(name, f"{one['total']:,}", *shares, *counts)
    table.add_section()
    first, second, split = found["first"]["micro"], found["second"]["micro"], found["mcnemar"]
    shares = (f"{first:.2%}", f"{second:.2%}", f"{found['difference']:+.2%}")
    counts = (f"{split['only_second']:,}", f"{split['only_first']:,}")
    table.add_row("all", f"{found['total']:,}", *shares, *counts, style="bold")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    for line in _verdict(found):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _verdict(found: "Comparison") -> Iterator[str]:
    """Yields sentences on what a difference is worth."""
    low, high = found["interval"]
    yield (
        f"difference {found['difference']:+.2%} ± {found['stderr']:.2%}, 95 % interval {low:+.2%} "
        f"to {high:+.2%}; paired t test p = {found['p_value']:.3g}; McNemar p = "
        f"{found['mcnemar']['p_value']:.3g}"
    )
    if found["interval_clustered"] is not None:
        low, high = found["interval_clustered"]
        yield f"over subjects: 95 % interval {low:+.2%} to {high:+.2%}"
    yield f"{found['choices_changed']:,} of {found['total']:,} choices changed"
