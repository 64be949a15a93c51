"""Runs a function on several gloo ranks; the processes live for the whole test session.

Importing torch and megatron costs a process five seconds, so the ranks are forked from one that
has done it, and get one job after the other, each with a process group of its own.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

_TIMEOUT = 240
# Of a rank to its pool: closed when the process has done all that it does at its end.
_kept_open: list[Connection] = []


def on_cpu() -> None:
    """Activates the CPU in this process."""
    from glm3cli.device import select

    select("cpu").activate()


def _serve(address: str, rank: int, activate: Callable[[], None]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    connection = Client(address)
    _kept_open.append(connection)
    connection.send((rank, os.getpid()))
    activate()
    while True:
        job = connection.recv()
        if job is None:
            return
        function, args, world_size, port = job
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",  # the pool has opened it
        )
        try:
            connection.send((True, function(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
            # A rank that failed leaves the others waiting: the pool starts all of them anew.
            return
        gc.collect()  # the process groups of the job, each with threads of its own


def _nurse(orders: Connection, address: str) -> None:
    """Forks a rank on the CPU for every number that it gets."""
    os.environ["OMP_NUM_THREADS"] = "1"
    on_cpu()
    # What every rank needs, and megatron-core beneath it. Only imports: threads, of torch or of
    # gloo, would not live on in the ranks.
    for part in ("train.setup", "checkpoint.load", "checkpoint.run.resume", "infer.engine"):
        importlib.import_module(f"glm3cli.{part}")
    gc.freeze()  # what the ranks inherit needn't be looked through after each of their jobs
    context = multiprocessing.get_context("fork")
    while (rank := orders.recv()) is not None:
        context.Process(target=_serve, args=(address, rank, on_cpu)).start()


def _open_store() -> Any:
    """A store for one job; it has its port for itself from the start, unlike one told to rank 0."""
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


class RankPool:
    """Processes that stay alive between jobs, as many as a job has needed so far.

    Each runs on the device of `activate`.
    """

    def __init__(self, activate: Callable[[], None] = on_cpu) -> None:
        self._activate = activate
        self._listener = Listener()
        self._nurse: Connection | None = None
        self._ranks: list[tuple[int, Connection]] = []  # with their process numbers

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls `function(*args)` on every rank and gives the results by rank.

        Any rank's error fails the test with that rank's traceback.
        """
        self._start(world_size)
        store = _open_store()
        for _, connection in self._ranks[:world_size]:
            connection.send((function, args, world_size, store.port))
        results: list[Any] = [None] * world_size
        errors = []
        for rank, (_, connection) in enumerate(self._ranks[:world_size]):
            # After the first failure the others only hang in a collective.
            if not connection.poll(1 if errors else _TIMEOUT):
                errors.append(f"rank {rank}: no answer")
                continue
            try:
                ok, value = connection.recv()
            except EOFError:
                ok, value = False, "the process died"
            if ok:
                results[rank] = value
            else:
                errors.append(f"rank {rank}:\n{value}")
        if errors:
            self._end_ranks()
            raise AssertionError("\n".join(errors))
        return results

    def close(self) -> None:
        """Ends all processes."""
        self._end_ranks()
        self._listener.close()
        if self._nurse is not None:
            self._nurse.send(None)
            self._nurse = None

    def _end_ranks(self) -> None:
        """Those that hang are killed."""
        for _, connection in self._ranks:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process, connection in self._ranks:
            connection.poll(2)
            connection.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._ranks = []

    def _start(self, world_size: int) -> None:
        missing = range(len(self._ranks), world_size)
        for rank in missing:
            self._begin(rank)
        begun: dict[int, tuple[int, Connection]] = {}
        while len(begun) < len(missing):
            connection = self._listener.accept()
            rank, process = connection.recv()
            begun[rank] = process, connection
        self._ranks += [begun[rank] for rank in missing]

    def _begin(self, rank: int) -> None:
        context, address = multiprocessing.get_context("spawn"), str(self._listener.address)
        if self._activate is not on_cpu:  # another device comes before all that a nurse imports
            context.Process(target=_serve, args=(address, rank, self._activate)).start()
            return
        if self._nurse is None:
            self._nurse, theirs = context.Pipe()
            context.Process(target=_nurse, args=(theirs, address)).start()
            theirs.close()
        self._nurse.send(rank)
