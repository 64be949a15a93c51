"""Shares batches among the data parallel ranks: each model copy runs every so many-th batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from glm3cli.parallel.groups import Grid

Work = TypeVar("Work")
Result = TypeVar("Result")


def spread(
    grid: Grid, batches: Sequence[Work], run: Callable[[Work], Result]
) -> Iterator[list[Result]]:
    """Runs all batches, one per model copy at a time.

    Yields after each round, on every rank, the results of the round's batches in their order.
    """
    for start in range(0, len(batches), grid.dp_size):
        mine = start + grid.dp_rank
        result = [run(batches[mine])] if mine < len(batches) else []
        yield [item for results in _gathered(grid, result) for item in results]


def _gathered(grid: Grid, value: list[Any]) -> list[list[Any]]:
    if grid.dp_size == 1:
        return [value]
    values: list[Any] = [None] * grid.dp_size
    dist.all_gather_object(values, value, group=grid.dp_group)
    return values


def from_first_rank(grid: Grid, value: Any) -> Any:
    """What rank 0 has for `value`, on every rank."""
    if grid.world_size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def batches_by_length(
    positions: Iterable[int], lengths: Sequence[int], batch_size: int
) -> list[list[int]]:
    """The `positions` of items in batches of similar length, the longest first.

    The longest batch needs the most memory: if that is too much, the first batch tells.
    """
    ranked = sorted(positions, key=lambda i: -lengths[i])
    return [ranked[i : i + batch_size] for i in range(0, len(ranked), batch_size)]
