"""Sends SIGTERM to trainings in every phase, and tells how many saved and ended with 143.

    python -m tests.benchmarks.stop_training --times 5

The phases: while the run is built (its indices, its model), in a step, in a validation, and while a
checkpoint is written, at once and in the background.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PHASES: dict[str, dict[str, Any]] = {
    "building": {},
    "step": {},
    "validation": {"eval_interval": 1, "eval_iters": 50_000},
    "saving": {"save_interval": 1, "keep_last": 2, "no_async_save": True},
    "saving in the background": {"save_interval": 1, "keep_last": 2},
}


def stops_well(project: Any, run: Path, phase: str, moment: float) -> bool:
    """Whether a run that gets SIGTERM in `phase` saves and exits with 143."""
    from tests.support.project import end, start, steps
    from tests.support.train_command import checkpoints, options

    values = {"train_iters": 100_000, "save_interval": None, **PHASES[phase]}
    log = run.with_name(f"{run.name}-log")
    process = start(log, *options(project, run, **values))
    # run.yaml is there before the data and the model are; the first step comes after them.
    awaited = run / ("run.yaml" if phase == "building" else "metrics.jsonl")
    while process.poll() is None and not _is_there(awaited, phase):
        time.sleep(0.005)
    time.sleep(moment * (0.2 if phase == "building" else 1.0))
    process.send_signal(signal.SIGTERM)
    ended = end(process, log)
    done = steps(run) if (run / "metrics.jsonl").exists() else []
    last = [f"iter_{done[-1]['iteration']:07d}"] if done else []
    well = ended.code == 143 and checkpoints(run)[-1:] == last
    if not well:
        print(ended.code, checkpoints(run), last, ended.err[-800:])
    return well


def _is_there(file: Path, phase: str) -> bool:
    if not file.exists():
        return False
    return phase == "building" or '"loss"' in file.read_text()


def main() -> None:
    """Prints how many of each phase."""
    from tests.support.project import make_project

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=4)
    times = parser.parse_args().times
    moments, all_well = random.Random(0), True
    with tempfile.TemporaryDirectory() as name:
        project = make_project(Path(name))
        for phase in PHASES:
            well = sum(
                stops_well(project, Path(name) / f"{phase}-{time_}", phase, moments.random())
                for time_ in range(times)
            )
            all_well &= well == times
            print(f"{phase}: {well} of {times}", flush=True)
    sys.exit(not all_well)


if __name__ == "__main__":
    main()
