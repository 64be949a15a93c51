"""`Checkpointer`: writes and restores the checkpoints of a run, RUN/iter_0000030 and so on.

A folder of such a name is complete: a checkpoint is written under another name, and renamed when
all of it is on the disk.
"""

import errno
import fcntl
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from glm3cli.checkpoint.adapter.config import AdapterConfig
from glm3cli.checkpoint.adapter.pairs import Adapter
from glm3cli.checkpoint.adapter.transfer import gather_adapter
from glm3cli.checkpoint.adapter.writer import write_adapter
from glm3cli.checkpoint.layouts.companions import copy_companions, copy_tokenizer
from glm3cli.checkpoint.locate import ADAPTER, iteration_folder, iteration_of
from glm3cli.checkpoint.run.durable import publish, remove
from glm3cli.checkpoint.run.holdings import find_holdings
from glm3cli.checkpoint.run.resume import disk_trouble, load_training, save_request
from glm3cli.config.model import ModelConfig
from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.host.files import existing_parent
from glm3cli.parallel.storage import Storage, together
from glm3cli.train.candidates import assemble
from glm3cli.train.origin import Change, lost_order
from glm3cli.train.progress.state import State
from glm3cli.train.resumable import find_checkpoints, link_best, set_aside
from glm3cli.train.step import TrainStep

if TYPE_CHECKING:
    from glm3cli.train.report.metrics import Metrics


@dataclass
class Checkpointer:
    """Writes the checkpoints of a run, at once or while training goes on, and restores them.

    Attributes:
        run: The folder of the run.
        model: The shape of the model, which is written into every checkpoint.
        companions: The folder from which the remote code and other small files of a model are
            copied into every checkpoint.
        tokenizer: The vocabulary's file of the run, which is copied into every checkpoint with what
            lists tokens beside it.
        keep_last: The number of newest checkpoints to keep; None keeps all.
        num_bytes: The size of a checkpoint, in bytes; an estimate.
        in_background: Whether training goes on while a checkpoint is written.
        storage: The storage of this rank that `run` is on.
        origin: What the run is made of, which every checkpoint notes; rank 0's is written.
        adapter: The settings of the adapter that the run trains, as adapter_config.json has them;
            None for a run that trains weights.
        keeps_best: Whether the checkpoint with the lowest validation loss is kept, and linked as
            RUN/best.
        loaded: The checkpoint that was restored last; None if none was.
    """

    run: Path
    model: ModelConfig
    companions: Path
    tokenizer: Path
    keep_last: int | None
    num_bytes: int
    in_background: bool
    storage: Storage
    origin: Mapping[str, Any] = field(default_factory=dict)
    adapter: AdapterConfig | None = None
    keeps_best: bool = False
    loaded: Path | None = None
    _queue: AsyncCallsQueue = field(default_factory=AsyncCallsQueue)

    def check_space(self) -> None:
        """Checks that a whole checkpoint fits on the disk.

        Each machine needs room for all of it, since a run goes on from whole checkpoints.

        Raises:
            CheckpointError: It doesn't fit.
        """
        free = shutil.disk_usage(existing_parent(self.run)).free
        if free < self.num_bytes:
            raise CheckpointError(
                f"--save {self.run}: a checkpoint takes {self.num_bytes / 2**30:.1f} GiB, but "
                f"{free / 2**30:.1f} GiB are free",
                "free some space, keep fewer checkpoints (--keep-last), or choose another disk",
            )

    def save(self, train_step: TrainStep, state: State, metrics: "Metrics") -> int:
        """Writes a checkpoint, or begins to if `in_background`; all ranks must call it.

        Args:
            train_step: Has the weights, the optimizer and the schedule.
            state: The progress of the run.
            metrics: The report that gets an event when the checkpoint is complete.

        Returns:
            The iteration of the checkpoint.

        Raises:
            CheckpointError: It can't be written, or the one before couldn't be.
        """
        self.finish()  # one at a time
        started = time.perf_counter()
        folder = self.run / iteration_folder(state.iteration)
        with disk_trouble(folder):
            partial = self._begin(folder)
            adapter = self._adapter_of(train_step)
            request = save_request(
                partial,
                train_step.chunks,
                train_step.optimizer,
                train_step.scheduler,
                state.to_dict(),
                train_step.grid,
            )
        stall = 0.0
        best = self.run / iteration_folder(state.best_iteration) if self.keeps_best else None

        def publish() -> None:
            aside = self._publish(partial, folder, adapter, best)
            durable = time.perf_counter() - started
            if aside:
                metrics.event("set_aside", paths=", ".join(map(str, aside)))
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
        """Publishes the checkpoint that was being written, if it is complete by now.

        All ranks must call it.

        Raises:
            CheckpointError: The checkpoint can't be written.
        """
        with disk_trouble(self.run):
            self._queue.maybe_finalize_async_calls()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if there is one, and publishes it.

        All ranks must call it.

        Raises:
            CheckpointError: The checkpoint can't be written.
        """
        with disk_trouble(self.run):
            self._queue.maybe_finalize_async_calls(blocking=True)

    def newest(self, metrics: "Metrics", iteration: int) -> Path | None:
        """Returns the newest checkpoint up to an iteration; None if there is none.

        All ranks must call it. Every storage gets the files of the checkpoint that it lacks. Where
        the run has none of its own yet, it is the one that the run has gone on from.

        Args:
            metrics: The report that gets an event if files had to be copied.
            iteration: The iteration of the checkpoint that was written or restored last. Later ones
                are there where the run has gone on from an earlier one.

        Raises:
            CheckpointError: A file of the checkpoint is gone, or doesn't fit on a disk that lacks
                it.
        """
        complete = [path for path in self._complete() if (iteration_of(path) or 0) <= iteration]
        if not complete:
            return self.loaded
        self.make_whole(complete[-1], metrics)
        return complete[-1]

    def make_whole(self, folder: Path, metrics: "Metrics") -> None:
        """Gives every storage the files of a checkpoint that it lacks; all ranks must call it.

        Raises:
            CheckpointError: A file of the checkpoint is gone, or doesn't fit on a disk that lacks
                it.
        """
        if self.storage.is_shared:
            return
        holdings = find_holdings(folder, self.storage)
        if holdings.problem:
            raise CheckpointError(f"{folder}: {holdings.problem}", "run the same command again")
        assemble(folder, holdings, self.storage, metrics)

    def _complete(self) -> list[Path]:
        """Returns the checkpoints that every storage has, or has its part of, oldest first."""
        own_names = [path.name for path in find_checkpoints(self.run)]
        names = set(own_names).intersection(*self.storage.gather(own_names))
        return [path for path in find_checkpoints(self.run) if path.name in names]

    def has(self, iteration: int) -> bool:
        """Returns whether the run has the checkpoint of a step; all ranks must call it."""
        return self.run / iteration_folder(iteration) in self._complete()

    def load(
        self,
        folder: Path,
        train_step: TrainStep,
        metrics: "Metrics",
        event: str = "resume",
        changes: Sequence[Change] | None = (),
    ) -> State:
        """Restores a checkpoint, and reports what of it could not be restored, and what changed.

        All ranks must call it.

        Args:
            folder: The checkpoint.
            train_step: Takes the weights, the optimizer's state and that of the schedule.
            metrics: The report that gets the event.
            event: The name of the event, `resume` or `rollback`.
            changes: In what this run differs from the one that wrote the checkpoint; None if that
                isn't known.

        Returns:
            The progress of the run when the checkpoint was saved.

        Raises:
            CheckpointError: The checkpoint is damaged, or belongs to another model.
        """
        progress, missing = load_training(
            folder, train_step.chunks, train_step.optimizer, train_step.scheduler, train_step.grid
        )
        state = State.from_dict(progress)
        self.loaded = folder
        kept = "" if missing else ", random generators"
        missing += lost_order(changes or ())
        metrics.event(
            event,
            path=str(folder),
            iteration=state.iteration,
            restored=f"weights, optimizer, schedule, data position{kept}",
            not_restored="; ".join(missing) or "nothing",
            changed=_phrase(changes),
        )
        return state

    def _begin(self, folder: Path) -> Path:
        """Makes an empty folder with a temporary name for the checkpoint `folder`.

        Its random part keeps processes that have outlived an earlier run from writing into it. The
        leftovers of earlier runs are removed.

        Raises:
            CheckpointError: A checkpoint doesn't fit on the disk.
        """
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

    def _adapter_of(self, train_step: TrainStep) -> Adapter | None:
        """Returns the adapter that the run trains, if it does, on rank 0; None on all others."""
        if self.adapter is None:
            return None
        adapter = gather_adapter(train_step.chunks, self.model, train_step.grid)
        return None if adapter is None else adapter.trimmed()

    def _publish(
        self, partial: Path, folder: Path, adapter: Adapter | None, best: Path | None
    ) -> list[Path]:
        """Completes what all ranks have written to `partial`, and renames it to `folder`.

        The run's folder as a model is its newest checkpoint, and `--resume auto` goes on from it:
        later ones, of a course that this run has left by going on from an earlier checkpoint, get
        another name.

        Args:
            partial: The folder under its temporary name.
            folder: The final name.
            adapter: What the run trains, if it is an adapter and this is rank 0.
            best: The checkpoint with the lowest validation loss so far, to be kept; None to keep
                none for its loss.

        Returns:
            The new names of later checkpoints on this rank's storage.
        """
        aside: list[Path] = []
        with together():
            if self.storage.rank == 0:
                copy_companions(self.companions, partial, self.model)
                copy_tokenizer(self.tokenizer, partial)
            if adapter is not None and self.adapter is not None:
                target = partial / ADAPTER
                target.mkdir()
                base = Path(self.adapter.base_model_name_or_path or "")
                write_adapter(target, adapter, "chatglm", self.model, self.adapter, base)
        publish(partial, folder, {"run": str(self.run)}, self.storage, self.origin)
        with together():
            if self.storage.is_leader:
                aside = set_aside(self.run, folder)
        complete = self._complete()
        with together():
            if self.storage.is_leader:
                if best is not None and best.is_dir():
                    link_best(self.run, best.name)
                self._prune(complete, best)
        return aside

    def _prune(self, complete: list[Path], best: Path | None = None) -> None:
        """Removes what is older than the newest `keep_last` complete checkpoints.

        Parts of checkpoints of which other storages lack theirs go, too.

        Args:
            complete: The checkpoints that every storage has, oldest first.
            best: A checkpoint that is kept however old it is.
        """
        if self.keep_last is None:
            return
        oldest = complete[-self.keep_last :][0]
        for checkpoint in find_checkpoints(self.run):
            if checkpoint == oldest:
                return
            if checkpoint != best:
                remove(checkpoint)


def _phrase(changes: Sequence[Change] | None) -> str:
    """Returns the changes as text."""
    if changes is None:
        return "unknown: the checkpoint doesn't say what it is of"
    return "; ".join(map(str, changes)) or "nothing"


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Locks the folder of a run against other runs while the block runs.

    Raises:
        ConfigError: Another run has locked it.
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
