"""Chooses the checkpoint that a run goes on from, among those that `resumable` finds."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from glm3cli.checkpoint.run.durable import damage
from glm3cli.checkpoint.run.holdings import Holdings, bring_together, find_holdings
from glm3cli.checkpoint.run.resume import disk_trouble
from glm3cli.errors import CheckpointError
from glm3cli.parallel.storage import Storage, find_storage
from glm3cli.train.resumable import find_resume, iteration_key

if TYPE_CHECKING:
    from glm3cli.train.report.metrics import Metrics


def choose(run: Path, resume: str, storage: Storage, metrics: "Metrics") -> Path | None:
    """Finds the newest candidate that is whole, and gives every storage all of its files.

    All ranks must call it. Candidates that are passed over are reported with the reason.

    Args:
        run: The folder of the run.
        resume: The value of `--resume`: `auto`, `never`, or a folder.
        storage: The storage of this rank that `run` is on.
        metrics: The report that gets an event for each candidate passed over.

    Returns:
        The checkpoint, the same on all ranks; None for a run that starts anew.

    Raises:
        CheckpointError: There are candidates, but none of them is whole; or a disk has no room
            for the files that it lacks.
    """
    candidates = find_resume(run, resume)
    home = candidates[0].parent if candidates else run
    storage = storage if home == run else find_storage(home)
    # A machine that was replaced has none: all look at what any of them has.
    own_names = [path.name for path in candidates]
    names = {name for names in storage.gather(own_names) for name in names}
    problems = []
    for folder in sorted((home / name for name in names), key=iteration_key, reverse=True):
        holdings = find_holdings(folder, storage)
        problem = holdings.problem or damage(folder, holdings.files, storage)
        if problem is None:
            assemble(folder, holdings, storage, metrics)
            return folder
        problems.append(f"{folder}: {problem}")
        metrics.event("passed_over", path=str(folder), problem=problem)
    if problems:
        raise CheckpointError(
            f"no checkpoint is whole: {'; '.join(problems)}",
            "give an older checkpoint to --resume, or start a new run in another --save",
        )
    return None


def assemble(folder: Path, holdings: Holdings, storage: Storage, metrics: "Metrics") -> None:
    """Gives every storage all files of a checkpoint; all ranks must call it.

    Args:
        folder: The checkpoint.
        holdings: Which storage has which of its files.
        storage: The storage of this rank that `folder` is on.
        metrics: The report that gets an event if files had to be copied.

    Raises:
        CheckpointError: The files don't fit on a disk, or can't be written there.
    """
    started = time.perf_counter()
    with disk_trouble(folder):
        files, num_bytes = bring_together(folder, holdings, storage)
    if files:
        seconds = time.perf_counter() - started
        metrics.event("fetch", path=str(folder), files=files, bytes=num_bytes, seconds=seconds)
