"""Fixtures with ranks whose device is an emulated NPU."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from glm3cli.device.doctor.pins import ASCEND
from tests.support.npu import stubs
from tests.support.npu.emulation import start
from tests.support.npu.wheel import unpacked, version_here
from tests.support.ranks import RankPool

MINDSPEED = "GLM3_TEST_MINDSPEED"


@pytest.fixture(scope="session")
def wheels(request: pytest.FixtureRequest) -> Path:
    """The folder that keeps unpacked wheels from one run of the tests to the next."""
    return request.config.cache.mkdir("torch_npu")


@pytest.fixture(scope="session")
def npu_ranks(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Processes on emulated NPUs, with the torch_npu for the installed torch."""
    pool = _pool(wheels, tmp_path_factory.mktemp("npu"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def mindspeed_ranks(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """The same with MindSpeed, if an environment variable names a checkout of its branch."""
    mindspeed = os.environ.get(MINDSPEED)
    if mindspeed is None:
        pytest.skip(f"{MINDSPEED} names no checkout of MindSpeed's branch {ASCEND['MindSpeed']}")
    pool = _pool(wheels, tmp_path_factory.mktemp("npu"), mindspeed)
    yield pool
    pool.close()


def _pool(wheels: Path, folder: Path, mindspeed: str | None = None) -> RankPool:
    wheel = unpacked(version_here(), wheels)
    return RankPool(partial(_start, wheel, stubs.build(wheel), folder, mindspeed))


def _start(wheel: Path, libraries: list[Path], folder: Path, mindspeed: str | None) -> None:
    place = folder / str(os.getpid())
    place.mkdir()
    start(wheel, libraries, place, mindspeed)
