"""All-gather and reduce-scatter by direct exchange give what torch.distributed defines."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankPool

pytestmark = pytest.mark.dist

SIZE = 5  # numbers of a rank's part


def of_rank(rank: int, size: int) -> torch.Tensor:
    """Returns a rank's numbers, whose sum in fp32 depends on the order."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(size * SIZE, generator=generator) * 10.0**rank


def exchange(in_place: bool, at_once: bool) -> Any:
    """Returns this rank's results of each way of gathering and scattering."""
    from glm3cli.parallel.groups import open_grid
    from tests.support.tiny import train_config

    with open_grid(train_config()):
        group = dist.group.WORLD
        rank, size = dist.get_rank(), dist.get_world_size()
        found = []
        wholes = [of_rank(rank, size) * scale for scale in (1, 2)]
        gathered = [torch.full((size * SIZE,), torch.nan) for _ in wholes]
        own = slice(rank * SIZE, (rank + 1) * SIZE)
        for whole, target in zip(wholes, gathered, strict=True):
            target[own] = whole[own]
        before = [whole.clone() for whole in wholes]
        outputs = [whole[own] if in_place else torch.empty(SIZE) for whole in wholes]
        inputs = [g[own] if in_place else b[own] for g, b in zip(gathered, before, strict=True)]
        if at_once:
            with dist._coalescing_manager(group, async_ops=True) as both:
                for output, whole in zip(outputs, wholes, strict=True):
                    dist.reduce_scatter_tensor(output, whole, group=group, async_op=True)
            with dist._coalescing_manager(group, async_ops=True) as others:
                for target, part in zip(gathered, inputs, strict=True):
                    dist.all_gather_into_tensor(target, part, group=group, async_op=True)
            others.wait()  # not in the order in which they began
            both.wait()
        else:
            for output, whole in zip(outputs, wholes, strict=True):
                dist.reduce_scatter_tensor(output, whole)
            for target, part in zip(gathered, inputs, strict=True):
                work = dist.all_gather_into_tensor(target, part, async_op=True)
                assert size == 1 or type(work).__module__ == "glm3cli.device.gloo"
                work.wait()
                work.wait()
        if not in_place:
            assert all(map(torch.equal, wholes, before))
        largest = torch.empty(SIZE, dtype=torch.float32)
        dist.reduce_scatter_tensor(largest, of_rank(rank, size), op=dist.ReduceOp.MAX)
        found += [*outputs, *gathered, largest]
        return found


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_rank_gets_its_sums_in_order_and_all_parts(
    ranks: RankPool, size: int, in_place: bool, at_once: bool
) -> None:
    wholes = [of_rank(rank, size) for rank in range(size)]
    total = wholes[0].clone()
    for whole in wholes[1:]:
        total += whole
    parts = torch.cat([w[r * SIZE : (r + 1) * SIZE] for r, w in enumerate(wholes)])
    for rank, found in enumerate(ranks.run(size, exchange, in_place, at_once)):
        own = slice(rank * SIZE, (rank + 1) * SIZE)
        largest = torch.stack(wholes).max(dim=0).values[own]
        for tensor, expected in zip(
            found, [total[own], 2 * total[own], parts, 2 * parts, largest], strict=True
        ):
            assert torch.equal(tensor, expected)
