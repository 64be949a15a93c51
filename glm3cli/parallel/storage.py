"""Finds out which ranks see the same folder: machines may share a disk, or have one each.

Only a file that one rank writes and others look for can show it: paths and device numbers are alike
on all machines.
"""

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from glm3cli.errors import Glm3Error

T = TypeVar("T")


@dataclass(frozen=True)
class Storage:
    """The disk on which this rank sees a folder, among the disks of all ranks.

    Attributes:
        rank: This rank.
        members: The ranks that see the same folder as this one, and this one, in order.
        leaders: The lowest rank of each storage, in order; rank 0 is the first.
        places: HOST:FOLDER of each storage, by its leader's names; in the order of `leaders`.
    """

    rank: int
    members: tuple[int, ...]
    leaders: tuple[int, ...]
    places: tuple[str, ...]

    @property
    def is_leader(self) -> bool:
        """Whether this rank does the work that is done once on each storage."""
        return self.rank == self.members[0]

    @property
    def is_shared(self) -> bool:
        """Whether all ranks see the same folder."""
        return len(self.leaders) == 1

    @property
    def index(self) -> int:
        """The index of this rank's storage in `leaders`."""
        return self.leaders.index(self.members[0])

    def gather(self, value: T) -> list[T]:
        """Returns the leaders' values in their order; every rank must call it.

        Where all ranks see the same folder, each returns its own value, which is the same.
        """
        if self.is_shared:
            return [value]
        values = _gather(value)
        return [values[leader] for leader in self.leaders]


def find_storage(folder: Path) -> Storage:
    """Finds out which ranks see the same `folder`; every rank must call it.

    The folder is made where it doesn't exist. A folder that can't be written to is taken for the
    same on all ranks: no file could be copied there anyway.

    Raises:
        OSError: A rank can't make the folder.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with together():
        # Every rank does it: a network file system may remember for some time that the folder
        # wasn't there.
        folder.mkdir(parents=True, exist_ok=True)
    answers = _gather((uuid.uuid4().hex, f"{socket.gethostname()}:{folder.absolute()}"))
    can_write = all(_gather(os.access(folder, os.W_OK)))
    groups: list[list[int]] = []
    rest = list(range(world_size))
    while rest:
        leader = rest[0]
        seers = _seers(folder / f".probe-{answers[leader][0]}", leader) if can_write else rest
        groups.append([one for one in rest if one in seers])
        rest = [one for one in rest if one not in seers]
    leaders = tuple(group[0] for group in groups)
    members = next(tuple(group) for group in groups if rank in group)
    return Storage(rank, members, leaders, _distinct([answers[one][1] for one in leaders], leaders))


def _distinct(places: list[str], leaders: tuple[int, ...]) -> tuple[str, ...]:
    """Returns the places with a rank in front of those that are alike.

    Containers may all have the same host name.
    """
    named = zip(places, leaders, strict=True)
    return tuple(p if places.count(p) == 1 else f"rank {leader}'s {p}" for p, leader in named)


def _seers(probe: Path, leader: int) -> list[int]:
    """Returns the ranks that see a file that rank `leader` makes; its name must be new to all."""
    is_maker = dist.get_rank() == leader
    with together():
        if is_maker:
            probe.touch()
    seen = _gather(is_maker or probe.exists())
    if is_maker:
        probe.unlink(missing_ok=True)
    return [rank for rank, is_there in enumerate(seen) if is_there]


@contextmanager
def together() -> Iterator[None]:
    """Encloses a block that every rank runs: no rank goes on before all are done, or if one fails.

    The block must not call collectives that a failing rank would skip.

    Raises:
        OSError: It was raised in the block of the lowest rank that failed.
        Glm3Error: It was raised in the block of the lowest rank that failed.
    """
    problem: Exception | None = None
    try:
        yield
    except (OSError, Glm3Error) as error:
        problem = error
    found = first(problem)
    if found is not None:
        raise found


def first(value: T | None) -> T | None:
    """Returns the value of the lowest rank whose value isn't None; every rank must call it."""
    return next((one for one in _gather(value) if one is not None), None)


def tell(value: T, rank: int) -> T:
    """Returns the `value` that rank `rank` has; every rank must call it."""
    holder = [value]
    dist.broadcast_object_list(holder, src=rank)
    return holder[0]


def _gather(value: T) -> list[T]:
    """Returns the values of all ranks in their order; every rank must call it."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
