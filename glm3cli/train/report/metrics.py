"""What a run reports: a log line and a line of metrics.jsonl a step; rank 0 alone writes.

The tools of `--report-to` get the same numbers, and RUN/report.html is made of the file.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from glm3cli.config.training import TrainConfig
from glm3cli.train.progress.flops import Utilisation
from glm3cli.train.progress.phases import Phase, describe
from glm3cli.train.progress.state import State
from glm3cli.train.report.history import History
from glm3cli.train.report.report import write_report
from glm3cli.train.report.reporters import Reporter, open_reporters
from glm3cli.train.step import StepOutcome


class Metrics:
    """Writes to stderr, RUN/metrics.jsonl, and the tools of --report-to.

    Attributes:
        sources: How many of so many samples have come from each part of the data.
        last: What was written last.
    """

    def __init__(
        self, config: TrainConfig, *, is_speaker: bool, utilisation: Utilisation, world_size: int
    ) -> None:
        self._config = config
        self._utilisation = utilisation
        self._world_size = world_size
        self._file: TextIO | None = None
        self.sources: Callable[[int], dict[str, int]] = lambda _consumed: {}
        self._history = History()
        self._reporters: list[Reporter] = []
        self.last: dict[str, Any] = {}
        if not is_speaker:
            return
        config.save.mkdir(parents=True, exist_ok=True)
        file = config.save / "metrics.jsonl"
        _end_with_a_whole_line(file)
        self._history = History.read(file)
        self._file = file.open("a", encoding="utf-8")
        self._reporters = open_reporters(config.tools, config.save, config.to_options())

    def step(
        self,
        state: State,
        outcome: StepOutcome,
        seconds: float,
        peak_memory: int,
        phases: Mapping[Phase, float],
    ) -> None:
        """Reports one training step that took `seconds`, of which `phases` are the parts."""
        tokens = self._config.global_batch_size * self._config.seq_length
        rate = tokens / seconds / self._world_size
        record: dict[str, Any] = {
            "iteration": state.iteration,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "loss": outcome.loss,
            "lr": outcome.lr,
            "grad_norm": outcome.grad_norm,
            "loss_scale": outcome.loss_scale,
            "step_time": seconds,
            "tokens_per_second": rate * self._world_size,
            "tokens_per_second_per_device": rate,
            **self._utilisation.of_rate(rate),
            "skipped": state.skipped,
            "nan": state.nan,
            "peak_memory_bytes": peak_memory,
            **{f"{name}_time": spent for name, spent in phases.items()},
        }
        is_shown = state.iteration % self._config.log_interval == 0
        consumed = self.by_source(state.consumed_samples) if is_shown else {}
        if len(consumed) > 1:
            record["consumed_by_source"] = consumed
        self._write(record)
        if is_shown:
            self.say(_step_line(record, self._config.train_iters))

    def by_source(self, consumed: int) -> dict[str, dict[str, int]]:
        """Samples of each part of the data among the first `consumed`, and their tokens."""
        length = self._config.seq_length
        return {
            name: {"samples": samples, "tokens": samples * length}
            for name, samples in self.sources(consumed).items()
        }

    def validation(self, iteration: int, loss: float) -> None:
        """Reports a validation."""
        self._write({"iteration": iteration, "validation_loss": loss})
        perplexity = math.exp(min(20.0, loss))
        self.say(f"validation at iteration {iteration} | loss {loss:.6E} | ppl {perplexity:.6E}")

    def event(self, event: str, *, unsaid: Mapping[str, Any] | None = None, **details: Any) -> None:
        """Reports a start, resume, save, skip, rollback, signal, or stop.

        Args:
            event: Which of them.
            unsaid: What is too long for a line of the log: for metrics.jsonl alone.
            details: What it is about.
        """
        self._write({"event": event, "time": time.time(), **details, **(unsaid or {})})
        told = ", ".join(f"{key} {_told(value)}" for key, value in details.items())
        self.say(f"{event}: {told}" if told else event)
        if event == "save":
            self._write_report()

    def stop(self, state: State, totals: Mapping[Phase, float]) -> None:
        """Reports the end of a run and where its time went, in seconds per phase."""
        self.say(describe(totals))
        consumed = self.by_source(state.consumed_samples)
        unsaid = {"seconds": dict(totals)}
        self.event("stop", unsaid=unsaid, iteration=state.iteration, consumed_by_source=consumed)

    def say(self, text: str) -> None:
        """One line on stderr, with the time."""
        if self._file is not None:
            now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
            sys.stderr.write(f"[{now}] {text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Closes what was opened and writes the last report, however the run ended."""
        if self._file is not None:
            self._file.close()
            self._write_report()
        for reporter in self._reporters:
            reporter.close()

    def _write_report(self) -> None:
        if self._file is None:
            return
        try:
            write_report(self._config.save, self._history)
        except OSError as error:  # a full disk: not worth the run
            self.say(f"report.html is not written: {error.strerror}")

    def _write(self, record: dict[str, Any]) -> None:
        self.last = record
        if self._file is None:
            return
        self._history.add(_finite(record))
        self._file.write(json.dumps(_finite(record)) + "\n")
        self._file.flush()
        if "event" not in record:
            values = {k: v for k, v in record.items() if k != "iteration" and _is_number(v)}
            for reporter in self._reporters:
                reporter.log(record["iteration"], values)


def _end_with_a_whole_line(file: Path) -> None:
    """Removes a last line that a killed run has left unfinished."""
    if not file.is_file():
        return
    with file.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        start = max(0, end - 2**20)
        stream.seek(start)
        whole = stream.read().rfind(b"\n") + 1
        if start + whole < end:
            stream.truncate(start + whole)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_told(part)}" for key, part in value.items()) or "none"
    return str(value)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


def _step_line(record: dict[str, Any], train_iters: int) -> str:
    mfu = "-"
    if record["mfu"] is not None:
        mfu = f"{record['mfu']:.1%} full, {record['mfu_causal']:.1%} causal"
    return (
        f"iteration {record['iteration']:8d}/{train_iters:8d}"
        f" | consumed samples {record['consumed_samples']:12d}"
        f" | consumed tokens {record['consumed_tokens']:15d}"
        f" | loss {record['loss']:.6E}"
        f" | lr {record['lr']:.6E}"
        f" | grad norm {record['grad_norm']:.3f}"
        f" | loss scale {record['loss_scale']:.1f}"
        f" | step time (ms) {record['step_time'] * 1000:.1f}"
        f" | tokens/s/device {record['tokens_per_second_per_device']:.1f}"
        f" | TFLOP/s/device {record['tflops_per_device']:.3f}"
        f" | MFU {mfu}"
        f" | skipped {record['skipped']}"
        f" | nan {record['nan']}"
        f" | peak memory (MB) {record['peak_memory_bytes'] / 2**20:.0f}"
    )
