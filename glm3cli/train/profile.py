"""`--profile START:STOP`: a trace of some steps per rank, RUN/profile/rank_0_steps_3_5.json.gz.

chrome://tracing and Perfetto open it.
"""

import gzip
import shutil
from pathlib import Path
from typing import Any

from glm3cli.device import Device


class Profiler:
    """Records the steps of a range on this rank and writes them when the range is over."""

    def __init__(self, run: Path, steps: range, device: Device, rank: int) -> None:
        self._folder = run / "profile"
        self._steps = steps
        self._device = device
        self._rank = rank
        self._profiler: Any = None
        self._first = 0

    def begin(self, iteration: int) -> None:
        """Starts recording if this step is the first of the range that the run does."""
        if iteration in self._steps and self._profiler is None:
            self._first = iteration
            self._profiler = self._device.profiler()
            self._profiler.start()

    def end(self, iteration: int) -> None:
        """Writes the trace after the last step of the range."""
        if self._profiler is not None and iteration + 1 not in self._steps:
            self._write(iteration)

    def close(self, iteration: int) -> None:
        """Writes what a run that ends early has recorded."""
        if self._profiler is not None:
            self._write(iteration)

    def _write(self, last: int) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        final = self._folder / f"rank_{self._rank}_steps_{self._first}_{last}.json.gz"
        plain = final.with_name(f".{final.stem}")
        partial = final.with_name(f".{final.name}.partial")
        profiler.export_chrome_trace(str(plain))
        # Not every chip's profiler compresses by itself.
        with plain.open("rb") as source, gzip.open(partial, "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        partial.replace(final)
