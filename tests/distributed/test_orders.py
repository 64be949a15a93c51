"""Values that rank 0 gives to the other ranks, however late."""

import time
from datetime import timedelta
from typing import Any

import pytest

from tests.support.ranks import RankPool

pytestmark = pytest.mark.dist


def give_and_take(values: list[Any]) -> tuple[list[Any], list[bool], int]:
    """Runs on a rank; returns what it has got, and what is left in the store."""
    import torch.distributed as dist

    from glm3cli.config.parallel import ParallelConfig
    from glm3cli.parallel import orders
    from glm3cli.parallel.groups import open_grid

    orders._PATIENCE = timedelta(milliseconds=50)
    with open_grid(ParallelConfig()) as grid:
        way = orders.Orders(grid)
        if grid.rank == 0:
            for value in values:
                time.sleep(0.2)
                way.send(value)
        got = values if grid.rank == 0 else [way.receive() for _ in values]
        flags = [orders.told_by_rank_0(grid, grid.rank == at) for at in (0, 1)]
        dist.barrier()
        left = sum(way._store.check([str(number)]) for number in range(len(values)))
        dist.barrier()
        return got, flags, left


def test_all_ranks_get_what_rank_0_sends(ranks: RankPool) -> None:
    values = [{"prompt": [1, 2]}, "湖", None]
    assert ranks.run(3, give_and_take, values) == [(values, [True, False], 0)] * 3
