"""The CPU device is active in every test; several ranks come from one pool of processes."""

import warnings
from collections.abc import Iterator

import pytest

from tests.support.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes that run a function on several gloo ranks."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def cpu() -> None:
    """Activates the CPU device in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from glm3cli.device import select

        select("cpu").activate()
