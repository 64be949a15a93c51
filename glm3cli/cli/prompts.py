"""`glm3 generate --prompts-file`: prints or tells what comes of the prompts of a file."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import typer

from glm3cli.cli.progress import Progress, bar_or_lines
from glm3cli.config.inference import GenerateConfig
from glm3cli.parallel.launch import is_speaker

if TYPE_CHECKING:
    from glm3cli.infer.prompts.feed import FileProgress

_SECONDS_BETWEEN_LINES = 5.0
_NUM_SHOWN = 5  # bad lines


def continue_file(config: GenerateConfig) -> None:
    """Continues the prompts of a file, and prints the results unless a file gets them."""
    from glm3cli.infer.prompts.run import continue_file as run

    results = _Results(config)
    # A bar among the texts on a terminal would tear them apart.
    may_draw = is_speaker() and not (sys.stdout.isatty() and config.output is None)
    with bar_or_lines(_to_bar, _progress_lines(), "count", may_draw=may_draw) as report:
        progress = run(config, results.show, report)
    if progress is not None:
        results.end(progress)
        _tell(config, progress)


class _Results:
    """Prints results as they come: as texts, or as the parts of one JSON object."""

    def __init__(self, config: GenerateConfig) -> None:
        self._is_json = config.as_json and config.output is None
        self._is_silent = config.output is not None
        self._separator = '{"results": ['
        self._num_bad = 0

    def show(self, record: Mapping[str, Any]) -> None:
        """Prints a result."""
        if "error" in record:
            self._num_bad += 1
            if self._num_bad <= _NUM_SHOWN:
                typer.echo(f"warning: {record['error']}", err=True)
        if self._is_json:
            result = {name: value for name, value in record.items() if name != "line"}
            _write(self._separator + json.dumps(result, ensure_ascii=False))
            self._separator = ", "
        elif not self._is_silent:
            _write(f"{record['text'] or ''}\n")

    def end(self, progress: "FileProgress") -> None:
        """Prints the end of the JSON object."""
        if self._is_json:
            if self._separator != ", ":
                _write(self._separator)
            times = json.dumps(_times(progress)).removeprefix("{")
            _write(f"], {times}\n")


def _write(text: str) -> None:
    """Prints a piece of the result at once."""
    typer.echo(text, nl=False)


def _times(progress: "FileProgress") -> dict[str, float]:
    """Returns the times of a run, as `generate --json` names them."""
    return {
        "first_token_seconds": progress.first_token,
        "tokens_per_second": progress.tokens_per_second,
    }


def _tell(config: GenerateConfig, progress: "FileProgress") -> None:
    """Tells how a run has ended: on stderr, and with --output and --json on stdout."""
    if config.output is not None and config.as_json:
        facts = {"output": str(config.output), "lines": progress.done, "bad": progress.num_bad}
        typer.echo(json.dumps({**facts, **_times(progress)}, ensure_ascii=False))
    elif not config.as_json:
        speed = f"{progress.tokens_per_second:,.1f} tokens/s"
        if config.output is not None:
            typer.echo(f"{progress.done:,} results in {config.output}, {speed}", err=True)
        else:
            typer.echo(f"first token {progress.first_token:.2f} s, {speed}", err=True)
    if progress.num_bad:
        typer.echo(f"warning: {progress.num_bad:,} lines have no answer", err=True)
    if progress.growth > 0:
        more = "; --resume goes on with them" if config.output else ""
        typer.echo(
            f"warning: {config.prompts_file} has got {progress.growth:,} bytes since the start, "
            f"which were not read{more}",
            err=True,
        )


def _to_bar(progress: "FileProgress") -> Progress:
    """Returns what a bar shows of a run."""
    return Progress(progress.done, progress.total or progress.done, _speed(progress))


def _progress_lines() -> "Callable[[FileProgress], None]":
    """Returns a function that prints a line every five seconds."""
    last: float | None = None

    def report(progress: "FileProgress") -> None:
        nonlocal last
        if last is None or time.monotonic() - last < _SECONDS_BETWEEN_LINES:
            last = last or time.monotonic()
            return
        last = time.monotonic()
        total = f" of {progress.total:,}" if progress.total else ""
        left = progress.seconds_left
        rest = "" if left is None else f"  {left:,.0f} s left"
        typer.echo(f"{progress.done:,}{total} prompts  {_speed(progress)}{rest}", err=True)

    return report


def _speed(progress: "FileProgress") -> str:
    """Returns the speed and the bad lines of a run, as they are shown."""
    bad = f"  {progress.num_bad:,} bad" if progress.num_bad else ""
    return f"{progress.tokens_per_second:,.1f} tokens/s{bad}"
