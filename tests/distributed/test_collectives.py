"""Collectives in shared memory: what gloo gives, and a sentence where a rank has ended."""

import multiprocessing
import os
import platform
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from glm3cli.parallel.collectives import LARGEST, SharedMemory, size_of
from tests.support.ranks import RankPool

pytestmark = pytest.mark.dist


def sums() -> tuple[bool, list[torch.Tensor], list[torch.Tensor]]:
    """Returns whether memory is shared, sums, and those of gloo."""
    from glm3cli.parallel.collectives import Collectives
    from glm3cli.parallel.groups import open_grid
    from tests.support.tiny import train_config

    with open_grid(train_config()):
        ours = Collectives(dist.group.WORLD)
        found, expected = [], []
        generator = torch.Generator().manual_seed(dist.get_rank())
        sizes = [(1,), (3, 5), (LARGEST // 4,), (LARGEST // 4 + 1,), (16, 512)]
        for turn in range(20):
            # Whole numbers, whose sums are exact in any order.
            numbers = torch.randint(-20, 20, sizes[turn % 5], generator=generator)
            tensor = numbers.to([torch.float32, torch.bfloat16][turn % 2])
            expected.append(tensor.clone())
            ours.add_up(tensor)
            dist.all_reduce(expected[-1])
            found.append(tensor)
            parts = tensor.new_empty(dist.get_world_size(), *numbers.shape)
            dist.all_gather_into_tensor(parts, numbers.to(tensor.dtype))
            expected.append(parts)
            found.append(ours.gather(numbers.to(tensor.dtype)))
        for turn in range(200):  # no collective between keeps the ranks in step
            tensor = torch.full((64,), float(dist.get_rank() + turn))
            ours.add_up(tensor)
            found.append(tensor)
            expected.append(
                torch.full((64,), float(sum(range(turn, turn + dist.get_world_size()))))
            )
        return ours._memory is not None, found, expected


@pytest.mark.parametrize("size", [2, 4])
def test_they_are_those_of_gloo(ranks: RankPool, size: int) -> None:
    before = set(Path("/dev/shm").glob("glm3-*"))
    for is_shared, found, expected in ranks.run(size, sums):
        assert is_shared or platform.machine() != "x86_64"
        assert all(map(torch.equal, found, expected))
    assert set(Path("/dev/shm").glob("glm3-*")) <= before


def test_a_rank_that_has_ended_is_named() -> None:
    child = multiprocessing.get_context("spawn").Process(target=os.getpid)
    child.start()
    assert child.pid is not None
    with tempfile.TemporaryFile() as file:
        file.truncate(size_of(2))
        memory = SharedMemory(file.fileno(), 0, [os.getpid(), child.pid])
        with pytest.raises(
            dist.DistBackendError, match="rank 1 of a tensor parallel group has ended"
        ):
            memory.add_up(torch.ones(3))
    child.join()
