"""`Profiler`: traces of the steps that `--profile START:STOP` names, a file for each rank.

They are named like RUN/profile/rank_0_steps_3_5.json.gz; chrome://tracing and Perfetto open them.
"""

import gzip
import shutil
from pathlib import Path
from typing import Any

from glm3cli.device import Device


class Profiler:
    """Traces a range of steps on this rank, and writes the trace when the range is over."""

    def __init__(self, run: Path, steps: range, device: Device, rank: int) -> None:
        """Prepares to trace; an empty range traces nothing.

        Args:
            run: The folder of the run.
            steps: The iterations to trace.
            device: Has the profiler of the chip.
            rank: This rank, for the name of the file.
        """
        self._folder = run / "profile"
        self._steps = steps
        self._device = device
        self._rank = rank
        self._profiler: Any = None
        self._first = 0

    def begin(self, iteration: int) -> None:
        """Starts to trace if step `iteration`, about to begin, is the first of the range.

        A run that goes on within the range starts there.
        """
        if iteration in self._steps and self._profiler is None:
            self._first = iteration
            self._profiler = self._device.profiler()
            self._profiler.start()

    def end(self, iteration: int) -> None:
        """Writes the trace if step `iteration`, which has just ended, is the last of the range."""
        if self._profiler is not None and iteration + 1 not in self._steps:
            self._write(iteration)

    def close(self, iteration: int) -> None:
        """Writes what was traced so far, where the run ends within the range.

        Args:
            iteration: The last step of the run.
        """
        if self._profiler is not None:
            self._write(iteration)

    def _write(self, last: int) -> None:
        """Stops to trace, and writes the file aside before it gets its name; `last` is in it."""
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
