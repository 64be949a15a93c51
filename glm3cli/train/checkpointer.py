"""The folder of a run: its checkpoints as RUN/iter_0000030/, complete or absent."""

import errno
import fcntl
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from glm3cli.checkpoint.layouts.companions import copy_companions
from glm3cli.checkpoint.locate import iteration_folder, iteration_of
from glm3cli.checkpoint.run.durable import publish, remove
from glm3cli.checkpoint.run.holdings import find_holdings
from glm3cli.checkpoint.run.resume import disk_trouble, load_training, save_request
from glm3cli.config.model import ModelConfig
from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.host.files import existing_parent
from glm3cli.parallel.storage import Storage, together
from glm3cli.train.candidates import assemble, find_checkpoints
from glm3cli.train.progress.state import State
from glm3cli.train.step import TrainStep

if TYPE_CHECKING:
    from glm3cli.train.report.metrics import Metrics


@dataclass
class Checkpointer:
    """Writes a run's checkpoints, at once or while training goes on.

    Attributes:
        companions: Where the remote code and other small files of a MODEL are copied from.
        tokenizer: The tokenizer.model that the run uses.
        keep_last: Number of newest checkpoints to keep, or None for all.
        num_bytes: Of a checkpoint, about.
        in_background: Whether training goes on while a checkpoint is written.
        storage: Which ranks see the same `run`.
    """

    run: Path
    model: ModelConfig
    companions: Path
    tokenizer: Path
    keep_last: int | None
    num_bytes: int
    in_background: bool
    storage: Storage
    _queue: AsyncCallsQueue = field(default_factory=AsyncCallsQueue)

    def check_space(self) -> None:
        """Checks that a checkpoint fits on the disk; every machine needs all of one to go on.

        Raises:
            CheckpointError: It doesn't.
        """
        free = shutil.disk_usage(existing_parent(self.run)).free
        if free < self.num_bytes:
            raise CheckpointError(
                f"--save {self.run}: a checkpoint takes {self.num_bytes / 2**30:.1f} GiB, but "
                f"{free / 2**30:.1f} GiB are free",
                "free some space, keep fewer checkpoints (--keep-last), or choose another disk",
            )

    def save(self, train_step: TrainStep, state: State, metrics: "Metrics") -> int:
        """Begins to write a checkpoint, or writes it; gives its iteration."""
        self.finish()  # one at a time
        started = time.perf_counter()
        folder = self.run / iteration_folder(state.iteration)
        with disk_trouble(folder):
            partial = self._begin(folder)
            request = save_request(
                partial,
                train_step.chunks,
                train_step.optimizer,
                train_step.scheduler,
                state.to_dict(),
                train_step.grid,
            )
        stall = 0.0

        def publish() -> None:
            self._publish(partial, folder)
            durable = time.perf_counter() - started
            metrics.event(
                "save",
                iteration=iteration_of(folder),
                path=str(folder),
                stall_seconds=stall if self.in_background else durable,
                durable_seconds=durable,
            )

        request.add_finalize_fn(publish)
        with disk_trouble(folder):
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
        with disk_trouble(self.run):
            self._queue.maybe_finalize_async_calls()

    def finish(self) -> None:
        """Waits for a checkpoint that is being written, and publishes it.

        Raises:
            CheckpointError: It couldn't be written.
        """
        with disk_trouble(self.run):
            self._queue.maybe_finalize_async_calls(blocking=True)

    def newest(self, metrics: "Metrics") -> Path | None:
        """The newest checkpoint of the run, brought together; all ranks call it.

        Raises:
            CheckpointError: A file of it is gone, or doesn't fit where it is needed.
        """
        folder = next(reversed(self._complete()), None)
        if folder is None or self.storage.is_shared:
            return folder
        parts = find_holdings(folder, self.storage)
        if parts.problem:
            raise CheckpointError(f"{folder}: {parts.problem}", "run the same command again")
        assemble(folder, parts, self.storage, metrics)
        return folder

    def _complete(self) -> list[Path]:
        """The checkpoints that every storage has, or has its part of, oldest first."""
        ours = [path.name for path in find_checkpoints(self.run)]
        names = set(ours).intersection(*self.storage.gather(ours))
        return [self.run / name for name in sorted(names)]

    def load(
        self, folder: Path, train_step: TrainStep, metrics: "Metrics", event: str = "resume"
    ) -> State:
        """Restores a checkpoint into `train_step` and says what could not be restored."""
        progress, missing = load_training(
            folder, train_step.chunks, train_step.optimizer, train_step.scheduler, train_step.grid
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

    def _begin(self, folder: Path) -> Path:
        """A new folder aside, whose name no process that outlived its run writes to."""
        names = [f".{folder.name}.partial-{uuid.uuid4().hex[:8]}"]
        dist.broadcast_object_list(names, src=0)
        partial = self.run / names[0]
        with together():
            if self.storage.is_leader:
                for stale in self.run.glob(".iter_*.*"):
                    shutil.rmtree(stale, ignore_errors=True)
                self.check_space()
                partial.mkdir(parents=True)
        return partial

    def _publish(self, partial: Path, folder: Path) -> None:
        with together():
            if self.storage.rank == 0:
                copy_companions(self.companions, partial, self.model)
                shutil.copyfile(self.tokenizer, partial / "tokenizer.model")
        publish(partial, folder, {"run": str(self.run)}, self.storage)
        complete = self._complete()
        with together():
            if self.storage.is_leader:
                self._prune(folder, complete)

    def _prune(self, newest: Path, complete: list[Path]) -> None:
        """Removes what is older than the newest checkpoints, also parts that no run can use."""
        if self.keep_last is None:
            return
        # Later ones are there where a run goes on from an earlier checkpoint: not ours to remove.
        kept = [path for path in complete if path.name <= newest.name][-self.keep_last :]
        for old in find_checkpoints(self.run):
            if old.name < kept[0].name:
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
