"""Which checkpoint a run goes on from."""

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
    """The complete checkpoints of a run, oldest first; a folder of that name is complete."""
    if not run.is_dir():
        return []
    return sorted(
        path for path in run.iterdir() if iteration_of(path) is not None and path.is_dir()
    )


def find_resume(run: Path, resume: str) -> list[Path]:
    """The checkpoints to go on from, the first choice first; none for a new run.

    Raises:
        ConfigError: `never`, but the run has checkpoints that would be mixed up with new ones.
        CheckpointError: The given checkpoint isn't there.
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
    found = [path] if iteration_of(path) is not None and path.is_dir() else find_checkpoints(path)
    if not found:
        raise CheckpointError(
            f"--resume {resume} is no checkpoint and has none in it",
            "give auto, never, or a folder such as RUN/iter_0000030",
        )
    return found[-1:] if found == [path] else found[::-1]


def choose(run: Path, resume: str, storage: Storage, metrics: "Metrics") -> Path | None:
    """The newest candidate that is whole, brought together; those passed over are named.

    All ranks call it.

    Args:
        run: The folder of the run.
        resume: As in `--resume`.
        storage: Of `run`.
        metrics: To which events are told.

    Raises:
        CheckpointError: None of them is whole, or there is no room to bring one together.
    """
    found = find_resume(run, resume)
    home = found[0].parent if found else run
    storage = storage if home == run else find_storage(home)
    ours = [path.name for path in found]
    names = {name for names in storage.gather(ours) for name in names}
    problems = []
    for folder in (home / name for name in sorted(names, reverse=True)):
        parts = find_holdings(folder, storage)
        problem = parts.problem or damage(folder, parts.files, storage)
        if problem is None:
            assemble(folder, parts, storage, metrics)
            return folder
        problems.append(f"{folder}: {problem}")
        metrics.event("passed_over", path=str(folder), problem=problem)
    if problems:
        raise CheckpointError(
            f"no checkpoint is whole: {'; '.join(problems)}",
            "give an older checkpoint to --resume, or start a new run in another --save",
        )
    return None


def assemble(folder: Path, parts: Holdings, storage: Storage, metrics: "Metrics") -> None:
    """Brings a checkpoint together on every storage; all ranks call it.

    Raises:
        CheckpointError: It doesn't fit, or can't be written, on one of them.
    """
    started = time.perf_counter()
    with disk_trouble(folder):
        files, num_bytes = bring_together(folder, parts, storage)
    if files:
        seconds = time.perf_counter() - started
        metrics.event("fetch", path=str(folder), files=files, bytes=num_bytes, seconds=seconds)
