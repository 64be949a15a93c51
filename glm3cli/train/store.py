"""The folder of a run: its checkpoints as RUN/iter_0000030/, complete or absent."""

import errno
import fcntl
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from glm3cli.checkpoint.companions import copy_companions
from glm3cli.checkpoint.durable import damage, publish, remove
from glm3cli.checkpoint.resume import load_training, reason, save_request
from glm3cli.config.model import ModelConfig
from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.parallel.groups import Grid
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
    found = [path] if _NAME.fullmatch(path.name) and path.is_dir() else find_checkpoints(path)
    if not found:
        raise CheckpointError(
            f"--resume {resume} is no checkpoint and has none in it",
            "give auto, never, or a folder such as RUN/iter_0000030",
        )
    return found[-1:] if found == [path] else found[::-1]


def choose(candidates: Sequence[Path], grid: Grid, metrics: "Metrics") -> Path | None:
    """The first candidate that is undamaged; those that are passed over are named.

    Raises:
        CheckpointError: All of them are damaged.
    """
    problems = []
    for folder in candidates:
        problem = damage(folder, grid)
        if problem is None:
            return folder
        problems.append(f"{folder}: {problem}")
        metrics.event("passed_over", path=str(folder), problem=problem)
    if problems:
        raise CheckpointError(
            f"no checkpoint is whole: {'; '.join(problems)}",
            "give an older checkpoint to --resume, or start a new run in another --save",
        )
    return None


@dataclass
class Store:
    """Writes a run's checkpoints, at once or while training goes on.

    Attributes:
        companions: Where the remote code and other small files of a MODEL are copied from.
        tokenizer: The tokenizer.model that the run uses.
        keep_last: Number of newest checkpoints to keep, or None for all.
        num_bytes: Of a checkpoint, about.
        in_background: Whether training goes on while a checkpoint is written.
    """

    run: Path
    model: ModelConfig
    companions: Path
    tokenizer: Path
    keep_last: int | None
    num_bytes: int
    in_background: bool
    _queue: AsyncCallsQueue = field(default_factory=AsyncCallsQueue)

    def check_space(self) -> None:
        """Checks that a checkpoint fits on the disk.

        Raises:
            CheckpointError: It doesn't.
        """
        free = shutil.disk_usage(next(p for p in (self.run, *self.run.parents) if p.exists())).free
        if free < self.num_bytes:
            raise CheckpointError(
                f"--save {self.run}: a checkpoint takes {self.num_bytes / 2**30:.1f} GiB, but "
                f"{free / 2**30:.1f} GiB are free",
                "free some space, keep fewer checkpoints (--keep-last), or choose another disk",
            )

    def check_shared(self, grid: Grid) -> None:
        """Checks that all ranks have the same folder, into which each writes its part.

        Raises:
            CheckpointError: Some have another; they are named.
        """
        probe = self.run / ".probe"
        if grid.rank == 0:
            probe.touch()
        dist.barrier()
        found: list[bool] = [False] * grid.world_size
        dist.all_gather_object(found, probe.exists())
        if grid.rank == 0:
            probe.unlink()
        others = [str(rank) for rank, is_there in enumerate(found) if not is_there]
        if others:
            raise CheckpointError(
                f"--save {self.run}: rank(s) {', '.join(others)} have another folder of that name "
                "than rank 0",
                "give a --save on a disk that all machines share; each rank writes its part of a "
                "checkpoint there",
            )

    def save(self, trainer: Trainer, state: State, metrics: "Metrics") -> int:
        """Begins to write a checkpoint, or writes it; gives its iteration."""
        self.finish()  # one at a time
        started = time.perf_counter()
        folder = self.run / f"iter_{state.iteration:07d}"
        partial = self._begin(folder, trainer.grid)
        with _disk_trouble(folder):
            request = save_request(
                partial,
                trainer.chunks,
                trainer.optimizer,
                trainer.scheduler,
                state.to_dict(),
                trainer.grid,
            )
        stall = 0.0

        def publish() -> None:
            self._publish(partial, folder, trainer.grid)
            durable = time.perf_counter() - started
            metrics.event(
                "save",
                iteration=int(folder.name.removeprefix("iter_")),
                path=str(folder),
                stall_seconds=stall if self.in_background else durable,
                durable_seconds=durable,
            )

        request.add_finalize_fn(publish)
        with _disk_trouble(folder):
            if self.in_background:
                self._queue.schedule_async_request(request)
            else:
                request.execute_sync()
        stall = time.perf_counter() - started
        return state.iteration

    def poll(self) -> None:
        """Publishes a checkpoint that has been written meanwhile; every rank must call it.

        Raises:
            CheckpointError: It couldn't be written.
        """
        with _disk_trouble(self.run):
            self._queue.maybe_finalize_async_calls()

    def finish(self) -> None:
        """Waits for a checkpoint that is being written, and publishes it.

        Raises:
            CheckpointError: It couldn't be written.
        """
        with _disk_trouble(self.run):
            self._queue.maybe_finalize_async_calls(blocking=True)

    def newest(self) -> Path | None:
        """The newest checkpoint of the run."""
        return next(reversed(find_checkpoints(self.run)), None)

    def load(
        self, folder: Path, trainer: Trainer, metrics: "Metrics", event: str = "resume"
    ) -> State:
        """Restores a checkpoint into `trainer` and says what could not be restored."""
        progress, missing = load_training(
            folder, trainer.chunks, trainer.optimizer, trainer.scheduler, trainer.grid
        )
        state = State.from_dict(progress)
        metrics.event(
            event,
            path=str(folder),
            iteration=state.iteration,
            restored="weights, optimizer, schedule, data position"
            + ("" if missing else ", random generators"),
            not_restored="; ".join(missing) or "nothing",
        )
        return state

    def _begin(self, folder: Path, grid: Grid) -> Path:
        """A new folder aside, whose name no process that outlived its run writes to."""
        names = [f".{folder.name}.partial-{uuid.uuid4().hex[:8]}"]
        dist.broadcast_object_list(names, src=0)
        partial = self.run / names[0]
        if grid.rank == 0:
            for stale in self.run.glob(".iter_*.*"):
                shutil.rmtree(stale, ignore_errors=True)
            self.check_space()
            partial.mkdir(parents=True)
        dist.barrier()
        return partial

    def _publish(self, partial: Path, folder: Path, grid: Grid) -> None:
        if grid.rank == 0:
            copy_companions(self.companions, partial, self.model)
            shutil.copyfile(self.tokenizer, partial / "tokenizer.model")
            publish(partial, folder, {"run": str(self.run)})
            self._prune(folder)
        dist.barrier()

    def _prune(self, newest: Path) -> None:
        if self.keep_last is None:
            return
        # Later ones are there where a run goes on from an earlier checkpoint: not ours to remove.
        checkpoints = [path for path in find_checkpoints(self.run) if path.name <= newest.name]
        for old in checkpoints[: -self.keep_last]:
            remove(old)


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Keeps other runs out of the folder while this one lives.

    Raises:
        ConfigError: Another one lives in it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a+", encoding="utf-8") as file:
        try:
            # Unlike flock's, this lock isn't inherited by processes that outlive a killed run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                yield  # a file system without locks
                return
            file.seek(0)
            raise ConfigError(
                f"--save {run}: another run is writing there ({file.read() or 'unknown'})",
                "wait for its end, stop it, or choose another --save",
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextmanager
def _disk_trouble(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into a sentence; the checkpoints before stay as they are."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        raise CheckpointError(
            f"{folder} can't be written: {reason(error)}",
            "free some space and run the same command again; it goes on from the checkpoint before",
        ) from error
