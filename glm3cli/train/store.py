"""The folder of a run: its checkpoints as RUN/iter_0000030/, complete or absent."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from glm3cli.checkpoint.companions import copy_companions
from glm3cli.checkpoint.resume import load_training, save_training
from glm3cli.config.model import ModelConfig
from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.train.state import State
from glm3cli.train.step import Trainer

if TYPE_CHECKING:
    from glm3cli.train.metrics import Metrics

_NAME = re.compile(r"iter_(\d{7})")


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; a folder of that name is complete."""
    if not run.is_dir():
        return []
    return sorted(path for path in run.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def find_resume(run: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        ConfigError: `never`, but the run has checkpoints that would be mixed up with new ones.
        CheckpointError: The given checkpoint isn't there.
    """
    checkpoints = find_checkpoints(run)
    if resume == "auto":
        return checkpoints[-1] if checkpoints else None
    if resume == "never":
        if checkpoints:
            raise ConfigError(
                f"--save {run} already holds {checkpoints[-1].name}",
                "use --resume auto to go on, or another --save",
            )
        return None
    path = Path(resume)
    found = [path] if _NAME.fullmatch(path.name) and path.is_dir() else find_checkpoints(path)
    if not found:
        raise CheckpointError(
            f"--resume {resume} is no checkpoint and has none in it",
            "give auto, never, or a folder such as RUN/iter_0000030",
        )
    return found[-1]


@dataclass(frozen=True)
class Store:
    """Writes a run's checkpoints.

    Attributes:
        companions: Where the remote code and other small files of a MODEL are copied from.
        tokenizer: The tokenizer.model that the run uses.
        keep_last: Number of newest checkpoints to keep, or None for all.
    """

    run: Path
    model: ModelConfig
    companions: Path
    tokenizer: Path
    keep_last: int | None

    def save(self, trainer: Trainer, state: State, metrics: "Metrics") -> int:
        """Writes a checkpoint aside and publishes it by a rename; gives its iteration."""
        folder = self.run / f"iter_{state.iteration:07d}"
        partial = self.run / f".{folder.name}.partial"
        speaks = trainer.grid.rank == 0
        if speaks:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        save_training(
            partial,
            trainer.chunks,
            trainer.optimizer,
            trainer.scheduler,
            state.to_dict(),
            trainer.grid,
        )
        dist.barrier()
        if speaks:
            copy_companions(self.companions, partial, self.model)
            shutil.copyfile(self.tokenizer, partial / "tokenizer.model")
            _publish(partial, folder)
            self._prune(folder)
        dist.barrier()
        metrics.event("save", iteration=state.iteration, path=str(folder))
        return state.iteration

    def load(self, folder: Path, trainer: Trainer, metrics: "Metrics") -> State:
        """Restores a checkpoint into `trainer` and says what could not be restored."""
        progress, missing = load_training(
            folder, trainer.chunks, trainer.optimizer, trainer.scheduler, trainer.grid
        )
        state = State.from_dict(progress)
        metrics.event(
            "resume",
            path=str(folder),
            iteration=state.iteration,
            restored="weights, optimizer, schedule, data position",
            not_restored="; ".join(missing) or "nothing",
        )
        return state

    def _prune(self, newest: Path) -> None:
        if self.keep_last is None:
            return
        # Later ones are there where a run goes on from an earlier checkpoint: not ours to remove.
        checkpoints = [path for path in find_checkpoints(self.run) if path.name <= newest.name]
        for old in checkpoints[: -self.keep_last]:
            # Renamed first: a folder under a checkpoint's name is always complete.
            doomed = old.with_name(f".{old.name}.removed")
            old.rename(doomed)
            shutil.rmtree(doomed)


def _publish(partial: Path, folder: Path) -> None:
    for path in partial.iterdir():
        _sync(path)
    _sync(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
