"""`Collectives`: adds up or gathers a group's tensors, small ones on a CPU through shared memory.

A decoded token is summed twice in each layer, and chosen among the vocabulary's parts. Gloo passes
a tensor through sockets and threads of its own, and takes up to a millisecond for numbers that the
ranks hand over in some ten microseconds.
"""

import contextlib
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from glm3cli.device import require_active

# The most bytes of a tensor in shared memory, which holds them twice for each rank: a container may
# have no more than 64 MiB of it.
LARGEST = 2**21
# Processors on which all cores see the stores of one in their order. The others need barriers,
# which Python has none of.
_ORDERED = ("x86_64", "AMD64")
_FOLDER = Path("/dev/shm")
_LINE = 64  # bytes of a cache line: each rank counts in one of its own
_LOOKS = 2000  # at another rank's count, before the core is offered to other processes
_PATIENCE = 1800  # seconds, as long as the process groups wait


class Collectives:
    """The collectives of one group; all of its ranks make it, and call it, together."""

    def __init__(self, group: Any) -> None:
        """Shares memory if the group's ranks compute on the CPU of one machine.

        Args:
            group: The process group.
        """
        self._group = group
        self._memory = _share(group) if _could_share(group) else None

    def add_up(self, tensor: Tensor) -> None:
        """Replaces a contiguous tensor by the sum over the ranks, of the same bits on each.

        Raises:
            DistBackendError: Another rank has ended, or doesn't come.
        """
        if self._memory is None or tensor.nbytes > LARGEST:
            dist.all_reduce(tensor, group=self._group)
        else:
            self._memory.add_up(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all ranks, [ranks, *shape], each of which has one of its shape.

        Raises:
            DistBackendError: Another rank has ended, or doesn't come.
        """
        if self._memory is None or tensor.nbytes > LARGEST:
            parts = tensor.new_empty(self._group.size(), *tensor.shape)
            dist.all_gather_into_tensor(parts, tensor.contiguous(), group=self._group)
            return parts
        return self._memory.gather(tensor)


class SharedMemory:
    """Memory in which each rank has two places for a tensor, and a count of its exchanges.

    A rank fills a place again only two exchanges later. By then all others have begun the one
    between, and so have read what it held.
    """

    def __init__(self, descriptor: int, rank: int, pids: Sequence[int]) -> None:
        """Maps a file of `size_of(ranks)` zeros.

        Args:
            descriptor: The open file.
            rank: The index of this rank in its group.
            pids: The process id of each rank.
        """
        self._rank, self._pids, self._count = rank, pids, 0
        mapped = mmap.mmap(descriptor, size_of(len(pids)))
        first = _LINE * len(pids)
        self._counts = memoryview(mapped)[:first].cast("q")
        places = torch.frombuffer(mapped, dtype=torch.uint8, offset=first)
        self._places = places.view(2, len(pids), LARGEST)

    def add_up(self, tensor: Tensor) -> None:
        """Replaces a contiguous tensor of at most `LARGEST` bytes by the sum over the ranks.

        Raises:
            DistBackendError: Another rank has ended, or doesn't come.
        """
        flat = tensor.view(-1)
        torch.sum(self._exchange(flat), dim=0, out=flat)

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all ranks, of at most `LARGEST` bytes each, [ranks, *shape].

        Raises:
            DistBackendError: Another rank has ended, or doesn't come.
        """
        return self._exchange(tensor.reshape(-1)).clone().view(-1, *tensor.shape)

    def _exchange(self, flat: Tensor) -> Tensor:
        """Returns the flat tensors of all ranks, [ranks, n], which hold until the next call."""
        self._count += 1
        parts = self._places[self._count % 2, :, : flat.nbytes].view(flat.dtype)
        parts[self._rank] = flat
        self._counts[self._rank * _LINE // 8] = self._count
        for rank in range(len(self._pids)):
            self._await(rank)
        return parts

    def _await(self, rank: int) -> None:
        """Waits until another rank has begun the exchange, too.

        Raises:
            DistBackendError: It has ended, or doesn't come.
        """
        place, looks, end = rank * _LINE // 8, 0, time.monotonic() + _PATIENCE
        while self._counts[place] < self._count:
            looks += 1
            if looks >= _LOOKS:
                os.sched_yield()
            if looks % _LOOKS == 0 and (time.monotonic() > end or _has_ended(self._pids[rank])):
                # As a process group has it: the launcher looks for the rank that is the cause.
                raise dist.DistBackendError(
                    f"rank {rank} of a tensor parallel group has ended, or hangs, within a step"
                )


def size_of(num_ranks: int) -> int:
    """Returns the bytes of the memory that so many ranks share."""
    return num_ranks * (_LINE + 2 * LARGEST)


def _could_share(group: Any) -> bool:
    """Returns whether a group's ranks may share memory, which the same ones say on every rank."""
    return require_active().name == "cpu" and group.size() > 1 and dist.get_backend(group) == "gloo"


def _share(group: Any) -> SharedMemory | None:
    """Returns memory that a group's ranks share; None if they can't, which all find together."""
    path: list[str | None] = [None]
    if group.rank() == 0:
        with contextlib.suppress(OSError):  # full, or not there
            path = [_new_file(size_of(group.size()))]
    dist.broadcast_object_list(path, src=dist.get_global_rank(group, 0), group=group)
    found: list[Any] = [None] * group.size()
    with contextlib.ExitStack() as stack:
        descriptor = None
        if path[0] is not None and platform.machine() in _ORDERED:
            with contextlib.suppress(OSError):
                descriptor = os.open(path[0], os.O_RDWR)
                stack.callback(os.close, descriptor)
        own = (descriptor is not None, _machine(), os.getpid())
        dist.all_gather_object(found, own, group=group)
        if path[0] is not None and group.rank() == 0:
            Path(path[0]).unlink()  # the memory lives as long as those who have mapped it
        if descriptor is None or not all(one[:2] == own[:2] for one in found):
            return None
        return SharedMemory(descriptor, group.rank(), [pid for *_, pid in found])


def _new_file(size: int) -> str:
    """Makes a file of zeros in memory, and returns its path.

    Raises:
        OSError: There is no room.
    """
    descriptor, path = tempfile.mkstemp(prefix="glm3-", dir=_FOLDER)
    try:
        os.posix_fallocate(descriptor, 0, size)  # where writing finds no room, the process dies
    except OSError:
        Path(path).unlink()
        raise
    finally:
        os.close(descriptor)
    return path


def _machine() -> tuple[str, str]:
    """Returns what tells this machine's processes, as this one sees them, from those of others."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return boot, str(Path("/proc/self/ns/pid").readlink())
    return platform.node(), ""


def _has_ended(pid: int) -> bool:
    """Returns whether a process has ended, whether or not its parent has taken note."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
