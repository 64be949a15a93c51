"""Shares batches of prompts among the data parallel ranks, and gathers their results.

Each copy of the model runs a run of batches that follow each other, so that prompts that begin
alike are read by one copy. All shares need about the same work.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch.distributed as dist

from glm3cli.infer.rows import shared_length
from glm3cli.parallel.groups import Grid

Result = TypeVar("Result")

# About as many tokens keep a device busy; the copies' batches take the same time then.
_TOKENS = 2048


@dataclass(frozen=True)
class Batch:
    """Prompts that are run at once.

    Attributes:
        members: The positions of the prompts.
        cost: The number of tokens that have to be read for them.
    """

    members: tuple[int, ...]
    cost: int


def batches_in_order(
    order: Sequence[int], rows: Sequence[Sequence[int]], batch_size: int
) -> list[Batch]:
    """Cuts prompts into batches that need about the same work.

    Args:
        order: The positions of the prompts; those that begin alike stand side by side.
        rows: The token ids of every prompt, by position.
        batch_size: Most prompts of a batch.
    """
    batches: list[Batch] = []
    members: list[int] = []
    cost = 0
    before: Sequence[int] = ()
    for position in order:
        row = rows[position]
        unread = len(row) - shared_length(row, before, len(row) - 1)
        if members and (len(members) == batch_size or cost + unread > _TOKENS):
            batches.append(Batch(tuple(members), cost))
            members, cost = [], 0
        members.append(position)
        cost, before = cost + unread, row
    if members:
        batches.append(Batch(tuple(members), cost))
    return batches


def shares_of(batches: Sequence[Batch], num_shares: int) -> list[list[Batch]]:
    """Cuts a list of batches into shares, one after the other, of about the same cost."""
    total = sum(batch.cost for batch in batches)
    shares: list[list[Batch]] = [[] for _ in range(num_shares)]
    before = 0
    for batch in batches:
        middle = before + batch.cost / 2
        shares[int(middle * num_shares / total)].append(batch)
        before += batch.cost
    return shares


def spread(
    grid: Grid,
    batches: Sequence[Batch],
    begin: Callable[[tuple[int, ...]], Callable[[], list[Result]]],
) -> Iterator[dict[int, Result]]:
    """Runs all batches in rounds; in each round every model copy runs one of its share.

    A round begins before the results of the one before it are taken, so that the device has work
    while these are written.

    Args:
        grid: This rank's place on the grid of ranks.
        batches: All batches, the same on every rank.
        begin: Begins to run a batch on this rank's model copy, and returns a function that waits
            for the results of its members.

    Yields:
        After each round, on every rank: the results of the round by the positions of the prompts.
    """
    shares = shares_of(batches, grid.dp_size)
    mine = shares[grid.dp_rank]
    under_way: Callable[[], list[Result]] | None = None
    for turn in range(max(map(len, shares)) + 1):
        begun = begin(mine[turn].members) if turn < len(mine) else None
        if turn > 0:
            results = _gathered(grid, under_way() if under_way is not None else [])
            members = [share[turn - 1].members for share in shares if turn <= len(share)]
            yield dict(zip(chain(*members), chain(*results), strict=True))
        under_way = begun


def _gathered(grid: Grid, value: list[Any]) -> list[list[Any]]:
    """Returns the `value` of each data parallel rank, on all of them."""
    if grid.dp_size == 1:
        return [value]
    values: list[Any] = [None] * grid.dp_size
    dist.all_gather_object(values, value, group=grid.dp_group)
    return values


def from_first_rank(grid: Grid, value: Any) -> Any:
    """Returns, on every rank, the `value` of rank 0."""
    if grid.world_size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]
