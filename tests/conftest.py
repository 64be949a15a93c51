"""The CPU device is active in every test; several ranks come from one pool of processes."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from glm3cli.device import select
from tests.support.ranks import RankPool

# A shell that starts pytest in the background has it, and all that it starts, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests run side by side, and all of their models are tiny: threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
select("cpu").activate()  # before any test module imports a part of the model

# Drawn inputs may take long where the machine does much else. They are the same in every run, so
# that a change is judged by itself; `--hypothesis-profile=anew` draws others.
_ANY_SPEED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **_ANY_SPEED)
settings.register_profile("anew", **_ANY_SPEED)
settings.load_profile("same")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes that run a function on several gloo ranks."""
    pool = RankPool()
    yield pool
    pool.close()
