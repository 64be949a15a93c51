"""Ranks whose device is an emulated NPU."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support.npu import stubs
from tests.support.npu.emulation import start
from tests.support.npu.wheel import unpacked
from tests.support.ranks import RankPool


@pytest.fixture(scope="session")
def wheels(request: pytest.FixtureRequest) -> Path:
    """Where unpacked wheels are kept from one run of the tests to the next."""
    return request.config.cache.mkdir("torch_npu")


@pytest.fixture(scope="session")
def npu_ranks(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Processes on emulated NPUs, of the torch_npu that goes with the torch that is here."""
    wheel = unpacked(torch.__version__.split("+")[0], wheels)
    folder = tmp_path_factory.mktemp("npu")
    pool = RankPool(2, partial(_start, wheel, stubs.build(wheel), folder))
    yield pool
    pool.close()


def _start(wheel: Path, libraries: list[Path], folder: Path) -> None:
    import os

    place = folder / str(os.getpid())
    place.mkdir()
    start(wheel, libraries, place)
