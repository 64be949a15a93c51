"""Chooses the checkpoint that a run goes on from."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from glm3cli.checkpoint.locate import iteration_of
from glm3cli.checkpoint.run.durable import damage
from glm3cli.checkpoint.run.holdings import Holdings, bring_together, find_holdings
from glm3cli.checkpoint.run.resume import disk_trouble
from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.parallel.storage import Storage, find_storage

if TYPE_CHECKING:
    from glm3cli.train.report.metrics import Metrics


def find_checkpoints(run: Path) -> list[Path]:
    """Returns the checkpoints in the folder of a run, oldest first.

    A folder that has the name of a checkpoint is complete; others, such as one that is being
    written, have other names.
    """
    if not run.is_dir():
        return []
    return sorted(
        path for path in run.iterdir() if iteration_of(path) is not None and path.is_dir()
    )


def find_resume(run: Path, resume: str) -> list[Path]:
    """Returns the checkpoints that a run may go on from, the first choice first.

    Args:
        run: The folder of the run.
        resume: The value of `--resume`: `auto`, `never`, or a folder.

    Returns:
        The candidates, all in one folder; none for a run that starts anew.

    Raises:
        ConfigError: `resume` is `never`, but the run has checkpoints, with which those of a new run
            would be mixed up.
        CheckpointError: `resume` names a folder that neither is a checkpoint nor has one in it.
    """
    checkpoints = find_checkpoints(run)
    if resume == "auto":
        return checkpoints[::-1]
    if resume == "never":
        if checkpoints:
            raise ConfigError(
                f"--save {run} already holds {checkpoints[-1].name}",
                "use --resume auto to go on, or another --save",
            )
        return []
    path = Path(resume)
    if iteration_of(path) is not None and path.is_dir():
        return [path]
    candidates = find_checkpoints(path)
    if not candidates:
        raise CheckpointError(
            f"--resume {resume} is no checkpoint and has none in it",
            "give auto, never, or a folder such as RUN/iter_0000030",
        )
    return candidates[::-1]


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
    for folder in (home / name for name in sorted(names, reverse=True)):
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
