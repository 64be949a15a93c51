"""Requests to save or to stop, which all ranks agree on."""

import signal

import pytest

from tests.support.ranks import RankPool
from tests.support.tiny import train_config

pytestmark = pytest.mark.dist


def request_at_different_moments() -> list[int]:
    """Rank 0 gets a signal before the ranks agree, and rank 1 gets the same one afterwards.

    Returns:
        What the ranks agree on: before the signal, with it, while it isn't answered, after the
        save, after one more signal for rank 1 alone, and with a request to stop, twice.
    """
    import torch
    import torch.distributed as dist

    from glm3cli.parallel.groups import open_grid
    from glm3cli.train.signals import StopFlag

    with open_grid(train_config()):
        rank, stop = dist.get_rank(), StopFlag(torch.device("cpu"))
        agreed = [stop.agreed()]
        if rank == 0:
            signal.raise_signal(signal.SIGUSR1)
        agreed.append(stop.agreed())
        if rank == 1:
            signal.raise_signal(signal.SIGUSR1)
        agreed.append(stop.agreed())
        stop.saved()
        agreed.append(stop.agreed())
        if rank == 1:
            signal.raise_signal(signal.SIGUSR1)
        agreed.append(stop.agreed())
        if rank == 0:
            signal.raise_signal(signal.SIGTERM)
        agreed.append(stop.agreed())
        stop.saved()
        agreed.append(stop.agreed())
    return agreed


def test_a_signal_that_all_ranks_get_is_answered_by_one_save(ranks: RankPool) -> None:
    ended = 100 + signal.SIGTERM
    for agreed in ranks.run(2, request_at_different_moments):
        assert agreed == [0, 1, 1, 0, 1, ended, ended]
