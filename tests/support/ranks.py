"""Runs a function on several gloo ranks; the processes live for the whole test session.

Importing torch and megatron costs a process five seconds, so the ranks are forked from one that
has done it, and get one job after the other, each with a process group of its own.
"""

import contextlib
import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_TIMEOUT = 240


def on_cpu() -> None:
    """Activates the CPU in this process."""
    from glm3cli.device import select

    select("cpu").activate()


def _serve(connection: Connection, rank: int, activate: Callable[[], None]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
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
        self._ranks: list[tuple[Any, Connection]] = []

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
            self.close()
            raise AssertionError("\n".join(errors))
        return results

    def close(self) -> None:
        """Ends the processes; those that hang are killed."""
        for _, connection in self._ranks:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process, _ in self._ranks:
            process.join(2)
            process.kill()
            process.join()
        self._ranks = []

    def _start(self, world_size: int) -> None:
        if self._activate is on_cpu:
            context: Any = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["tests.support.preloaded"])
        else:
            context = multiprocessing.get_context("spawn")  # another device comes before torch
        for rank in range(len(self._ranks), world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self._activate))
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
