"""`Metrics`: what a run reports of its steps, validations and events; rank 0 alone writes.

Each is a line of RUN/metrics.jsonl and of the log on stderr. The tools of `--report-to` get the
same numbers, and RUN/report.html is made of metrics.jsonl.
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
from glm3cli.data.samples.loader import StepSize
from glm3cli.train.progress.flops import Utilisation
from glm3cli.train.progress.phases import Phase, describe
from glm3cli.train.progress.state import State, StepOutcome
from glm3cli.train.report.history import History
from glm3cli.train.report.report import write_report
from glm3cli.train.report.reporters import Reporter, open_reporters


class Metrics:
    """Writes what a run reports to stderr, RUN/metrics.jsonl, and the tools of --report-to.

    Attributes:
        sources: Returns how many of the first samples, and of their tokens without padding, come
            from each data set, by its prefix, for a number of samples.
    """

    def __init__(
        self, config: TrainConfig, *, is_speaker: bool, utilisation: Utilisation, world_size: int
    ) -> None:
        """Opens metrics.jsonl and the tools.

        Args:
            config: The settings of the run.
            is_speaker: Whether this rank reports; the others write nothing.
            utilisation: Turns tokens per second into TFLOP/s and MFU.
            world_size: The number of ranks, one device each.

        Raises:
            ConfigError: A tool of --report-to doesn't start, for want of a login, say.
        """
        self._config = config
        self._utilisation = utilisation
        self._world_size = world_size
        self._file: TextIO | None = None
        self.sources: Callable[[int], dict[str, dict[str, int]]] = lambda _consumed: {}
        self._history = History()
        self._reporters: list[Reporter] = []
        if not is_speaker:
            return
        config.save.mkdir(parents=True, exist_ok=True)
        file = config.save / "metrics.jsonl"
        _remove_torn_line(file)
        self._history = History.read(file)
        self._file = file.open("a", encoding="utf-8")
        self._reporters = open_reporters(config.tools, config.save, config.to_options())

    def step(
        self,
        state: State,
        outcome: StepOutcome,
        size: StepSize,
        peak_memory: int,
        phases: Mapping[Phase, float],
    ) -> None:
        """Reports a training step.

        Args:
            state: The progress of the run after the step.
            outcome: What the step did.
            size: The size of its global batch.
            peak_memory: The most memory of the device that was in use so far, in bytes.
            phases: The seconds that each phase of the step took.
        """
        seconds = sum(phases.values())
        rate = size.tokens / seconds / self._world_size
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
            "unpadded_tokens_per_second": size.unpadded / seconds,
            "trained_tokens_per_second": outcome.num_tokens / seconds,
            **self._utilisation.of_rate(rate, size.squares / size.tokens),
            "skipped": state.skipped,
            "nan": state.nan,
            "peak_memory_bytes": peak_memory,
            **{f"{name}_time": spent for name, spent in phases.items()},
            **outcome.means,
        }
        is_shown = state.iteration % self._config.log_interval == 0
        consumed = self.sources(state.consumed_samples) if is_shown else {}
        if len(consumed) > 1:
            record["consumed_by_source"] = consumed
        self._write(record)
        if is_shown:
            line = _step_line(record, self._config.train_iters)
            self.say(line + _means_text(outcome.means))

    def validation(self, iteration: int, loss: float, means: Mapping[str, float]) -> None:
        """Reports a validation.

        Args:
            iteration: The step after which it was done.
            loss: Its mean loss; NaN if its samples have nothing to train.
            means: Its further means, by name.
        """
        named = {f"validation_{name}": mean for name, mean in means.items()}
        self._write({"iteration": iteration, "validation_loss": loss, **named})
        perplexity = ""
        if self._config.method == "sft":  # other losses aren't those of tokens
            # In this order, a loss that is NaN stays it.
            perplexity = f" | ppl {math.exp(min(loss, 20.0)):.6E}"
        found = f"loss {loss:.6E}{perplexity}{_means_text(means)}"
        self.say(f"validation at iteration {iteration} | {found}")

    def event(self, event: str, *, unsaid: Mapping[str, Any] | None = None, **details: Any) -> None:
        """Reports an event, such as a start, resume, save, skip, rollback, signal, or stop.

        Args:
            event: The kind of event.
            unsaid: Details that are too long for a line of the log; metrics.jsonl alone gets them.
            details: The details of the event.
        """
        self._write({"event": event, "time": time.time(), **details, **(unsaid or {})})
        text = ", ".join(f"{key} {_as_text(value)}" for key, value in details.items())
        self.say(f"{event}: {text}" if text else event)
        if event == "save":
            self._write_report()

    def stop(self, state: State, totals: Mapping[Phase, float]) -> None:
        """Reports the end of a run, and where its time went.

        Args:
            state: The progress of the run at its end.
            totals: The seconds that each phase took since the run was started.
        """
        self.say(describe(totals))
        consumed = self.sources(state.consumed_samples)
        unsaid = {"seconds": dict(totals)}
        self.event("stop", unsaid=unsaid, iteration=state.iteration, consumed_by_source=consumed)

    def say(self, text: str) -> None:
        """Writes a line to stderr, with the time in front."""
        if self._file is not None:
            now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
            sys.stderr.write(f"[{now}] {text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Closes metrics.jsonl and the tools, and writes report.html, however the run ended."""
        if self._file is not None:
            self._file.close()
            self._write_report()
        for reporter in self._reporters:
            reporter.close()

    def _write_report(self) -> None:
        """Writes report.html; a run doesn't end because that fails."""
        if self._file is None:
            return
        try:
            write_report(self._config.save, self._history)
        except OSError as error:  # such as a full disk
            self.say(f"report.html is not written: {error.strerror}")

    def _write(self, record: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl, and gives its numbers to the tools."""
        if self._file is None:
            return
        self._history.add(_finite(record))
        self._file.write(json.dumps(_finite(record)) + "\n")
        self._file.flush()
        if "event" not in record:
            values = {k: v for k, v in record.items() if k != "iteration" and _is_number(v)}
            for reporter in self._reporters:
                reporter.log(record["iteration"], values)


def _remove_torn_line(file: Path) -> None:
    """Removes a last line that a killed run has left unfinished."""
    if not file.is_file():
        return
    with file.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        start = max(0, end - 2**20)
        stream.seek(start)
        whole_lines = stream.read().rfind(b"\n") + 1
        if start + whole_lines < end:
            stream.truncate(start + whole_lines)


def _is_number(value: Any) -> bool:
    """Returns whether a value is a finite number, which the tools can show."""
    return isinstance(value, int | float) and math.isfinite(value)


def _as_text(value: Any) -> str:
    """Returns a detail of an event as text; those that are mappings, key by key."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {_as_text(part)}" for key, part in value.items()) or "none"
    return str(value)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record with None for NaN and infinity, which JSON doesn't have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


def _means_text(means: Mapping[str, float]) -> str:
    """Returns the further means of a step or validation as the end of its line of the log."""
    return "".join(f" | {name} {mean:.6E}" for name, mean in means.items())


def _step_line(record: dict[str, Any], train_iters: int) -> str:
    """Returns the line of the log about a step, of which `record` is the line of metrics.jsonl."""
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
        f" | tokens/s unpadded {record['unpadded_tokens_per_second']:.1f}"
        f" | tokens/s trained {record['trained_tokens_per_second']:.1f}"
        f" | TFLOP/s/device {record['tflops_per_device']:.3f}"
        f" | MFU {mfu}"
        f" | skipped {record['skipped']}"
        f" | nan {record['nan']}"
        f" | peak memory (MB) {record['peak_memory_bytes'] / 2**20:.0f}"
    )
