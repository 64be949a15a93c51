"""Shares prompts among the data parallel ranks, and gathers their results.

Prompts that begin alike stand side by side. Their order is cut into stretches, and these into
batches that are run at once. Each copy of the model runs whole stretches, so that what prompts
begin with is read by one copy. All shares need about the same work.

A sum in fp32 depends on what it is computed beside, and with what was read before. A copy that
begins every stretch with an empty cache therefore gives it the same bits in every run, whichever
stretches the run still has to do.
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
# The longest stretch: what the next one reads again is little then, and so is what a kill loses.
_TOKENS_OF_A_STRETCH = 16 * _TOKENS
# So many batches of each copy are gathered at once where there are several copies: one that is slow
# at some batches then has them quick at others, and the copies hardly wait for each other.
_BATCHES_OF_A_ROUND = 8
# The fewest stretches of a share of some batches, so that the shares need about the same work.
_STRETCHES = 4


@dataclass(frozen=True)
class Batch:
    """Prompts that are run at once.

    Attributes:
        members: The positions of the prompts.
        cost: The number of tokens that have to be read for them.
        is_first: Whether a stretch begins with it.
    """

    members: tuple[int, ...]
    cost: int
    is_first: bool = True


Stretch = Sequence[Batch]


def stretches_in_order(
    order: Sequence[int], rows: Sequence[Sequence[int]], batch_size: int, num_shares: int
) -> list[Stretch]:
    """Cuts prompts into stretches: at a length, or earlier between two that begin differently.

    Args:
        order: The positions of the prompts; those that begin alike stand side by side.
        rows: The token ids of every prompt, by position.
        batch_size: Most prompts of a batch.
        num_shares: The number of shares that the stretches are for.
    """
    empty: Sequence[int] = ()
    before = [empty, *(rows[position] for position in order)]
    unread = [_unread(rows[position], one) for position, one in zip(order, before, strict=False)]
    share = sum(unread) / num_shares
    most = min(share, max(2 * _TOKENS, share / _STRETCHES), _TOKENS_OF_A_STRETCH)
    enough = max(most / 2, min(most, _TOKENS))
    starts, cost = [0], 0
    for place, position in enumerate(order):
        is_new = unread[place] == len(rows[position])
        if place > starts[-1] and cost + unread[place] > (enough if is_new else most):
            starts.append(place)
            cost = len(rows[position])
        else:
            cost += unread[place]
    ends = [*starts[1:], len(order)]
    return [
        batches_in_order(order[start:end], rows, batch_size)
        for start, end in zip(starts, ends, strict=True)
    ]


def batches_in_order(
    order: Sequence[int], rows: Sequence[Sequence[int]], batch_size: int
) -> list[Batch]:
    """Cuts the prompts of a stretch into batches that need about the same work.

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
        unread = _unread(rows[position], before)
        if members and (len(members) == batch_size or cost + unread > _TOKENS):
            batches.append(Batch(tuple(members), cost, is_first=not batches))
            members, cost = [], 0
        members.append(position)
        cost, before = cost + unread, rows[position]
    if members:
        batches.append(Batch(tuple(members), cost, is_first=not batches))
    return batches


def _unread(row: Sequence[int], before: Sequence[int]) -> int:
    """Returns how many tokens of a row have to be read after another one."""
    return len(row) - shared_length(row, before, len(row) - 1)


def shares_of(stretches: Sequence[Stretch], num_shares: int) -> list[list[Batch]]:
    """Cuts a list of stretches into shares, one after the other, of about the same cost."""
    costs = [sum(batch.cost for batch in stretch) for stretch in stretches]
    total = sum(costs)
    shares: list[list[Batch]] = [[] for _ in range(num_shares)]
    before = 0
    for stretch, cost in zip(stretches, costs, strict=True):
        middle = before + cost / 2
        shares[int(middle * num_shares / total)].extend(stretch)
        before += cost
    return shares


def spread(
    grid: Grid,
    stretches: Sequence[Stretch],
    begin: Callable[[Batch], Callable[[], list[Result]]],
) -> Iterator[dict[int, Result]]:
    """Runs all batches in rounds, in each of which every model copy runs some of its share.

    A batch begins before the results of the one before it are taken, so that the device has work
    while these are written.

    Args:
        grid: This rank's place on the grid of ranks.
        stretches: All batches, the same on every rank.
        begin: Begins to run a batch on this rank's model copy, and returns a function that waits
            for the results of its members.

    Yields:
        After each round, on every rank: the results of the round by the positions of the prompts.
    """
    shares = shares_of(stretches, grid.dp_size)
    mine = shares[grid.dp_rank]
    size = 1 if grid.dp_size == 1 else _BATCHES_OF_A_ROUND
    turns = max(map(len, shares))
    begun = begin(mine[0]) if mine else None
    for start in range(0, turns, size):
        results: list[Result] = []
        for turn in range(start, start + size):
            under_way, begun = begun, begin(mine[turn + 1]) if turn + 1 < len(mine) else None
            results += under_way() if under_way is not None else []
        done = [batch for share in shares for batch in share[start : start + size]]
        members = chain.from_iterable(batch.members for batch in done)
        yield dict(zip(members, chain(*_gathered(grid, results)), strict=True))


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
