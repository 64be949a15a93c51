"""The CPU device is active in every test; several ranks come from one pool of processes."""

from collections.abc import Iterator

import pytest

from glm3cli.device import select
from tests.support.ranks import RankPool

select("cpu").activate()  # before any test module imports a part of the model


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes that run a function on several gloo ranks."""
    pool = RankPool()
    yield pool
    pool.close()
