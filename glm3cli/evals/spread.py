"""Shares batches of prompts among the data parallel ranks, and gathers their results.

With dp copies of the model, copy r runs the batches r, r + dp, r + 2 dp, and so on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from glm3cli.parallel.groups import Grid

Work = TypeVar("Work")
Result = TypeVar("Result")


def spread(
    grid: Grid, batches: Sequence[Work], run: Callable[[Work], Result]
) -> Iterator[list[Result]]:
    """Runs all batches in rounds; in each round every model copy runs one batch.

    Args:
        grid: This rank's place on the grid of ranks.
        batches: All batches, the same on every rank.
        run: Runs one batch on this rank's model copy and returns its result.

    Yields:
        After each round, on every rank: the results of the round's batches, in the batches' order.
    """
    for start in range(0, len(batches), grid.dp_size):
        mine = start + grid.dp_rank
        result = [run(batches[mine])] if mine < len(batches) else []
        yield [item for results in _gathered(grid, result) for item in results]


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


def batches_by_length(
    positions: Iterable[int], lengths: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Groups items into batches of similar length, the longest items first.

    The batch of the longest items needs the most memory, so that a lack of it shows at once.

    Args:
        positions: The positions of the items to group.
        lengths: The length in tokens of every item, by position.
        batch_size: Most items of a batch.

    Returns:
        The positions of each batch's items.
    """
    ranked = sorted(positions, key=lambda i: -lengths[i])
    return [ranked[i : i + batch_size] for i in range(0, len(ranked), batch_size)]
