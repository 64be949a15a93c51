"""Requests to save or to stop, which all ranks agree on."""

import signal

import pytest

from glm3cli.train.signals import SAVE, StopFlag
from tests.support.ranks import RankPool
from tests.support.tiny import train_config

pytestmark = pytest.mark.dist


USR1, TERM = signal.SIGUSR1, signal.SIGTERM
STOPPED = 100 + TERM
# What happens before the ranks agree, a signal for a rank or a save, and on what they agree then.
MOMENTS = [
    (None, 0),
    ((0, USR1), SAVE),
    ((1, USR1), SAVE),  # the same signal, which has reached rank 1 a little later
    ("save", 0),
    ((1, USR1), SAVE),
    ((0, TERM), STOPPED),
    ("save", STOPPED),
]


def agree_at_all_moments() -> list[int]:
    """Returns on what the ranks agree at all moments; runs on a rank of the pool."""
    import torch
    import torch.distributed as dist

    from glm3cli.parallel.groups import open_grid

    with open_grid(train_config()):
        stop, agreed = StopFlag(torch.device("cpu")), []
        for event, _ in MOMENTS:
            if event == "save":
                stop.saved()
            elif event is not None and event[0] == dist.get_rank():
                signal.raise_signal(event[1])
            agreed.append(stop.agreed())
    return agreed


def test_a_signal_that_all_ranks_get_is_answered_by_one_save(ranks: RankPool) -> None:
    expected = [request for _, request in MOMENTS]
    assert ranks.run(2, agree_at_all_moments) == [expected, expected]
