"""Ranks find each other at the start, and name those that are missing."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from glm3cli.errors import ConfigError, DeviceError
from glm3cli.parallel import join as joining
from glm3cli.parallel.join import join, patience, ranges
from tests.support.ports import free_port

SHORT = timedelta(seconds=20)
HOST = socket.gethostname()


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this process a rank that torchrun might have started."""

    def become(number: int, world_size: int, seconds: float = 1.0) -> None:
        values = {
            "RANK": number,
            "WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
            "GLM3_START_TIMEOUT": seconds,
        }
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return become


def test_the_missing_ranks_and_the_hosts_of_the_others_are_named(rank: Any) -> None:
    rank(0, 4)
    with pytest.raises(DeviceError) as caught:
        join("gloo", SHORT)
    assert caught.value.message == (
        f"3 of 4 ranks have not started within 1 s: 1-3 (here are 0 on {HOST})"
    )
    assert "GLM3_START_TIMEOUT" in caught.value.hint


def together(numbers: list[int], world_size: int, seconds: float = 1.0) -> list[Any]:
    """Returns the result of each of these ranks, each in a thread and with a client of its own."""

    def start(number: int) -> Any:
        try:
            store = joining._open_store(number, world_size, seconds)
            return joining._meet(store, number, world_size, seconds)
        except DeviceError as error:
            return error.message

    server = joining._open_store(0, world_size, seconds)  # outlives all of them, as torchrun's
    with ThreadPoolExecutor(len(numbers)) as threads:
        found = list(threads.map(start, numbers))
    del server
    return found


def test_some_ranks_are_there(rank: Any) -> None:
    rank(0, 5)
    said = together([0, 1, 3], 5)
    assert f"2 of 5 ranks have not started within 1 s: 2, 4 (here are 0-1, 3 on {HOST})" in said


def test_rank_0_is_missing_where_torchrun_holds_the_store(rank: Any) -> None:
    rank(1, 2)
    (said,) = together([1], 2)
    assert said.startswith(f"rank 0 of 2 has not started within 1 s; rank 1 waits for it on {HOST}")


def test_a_rank_that_was_started_twice(rank: Any) -> None:
    rank(0, 3)
    assert f"rank 1 was started twice: on {HOST} and on {HOST}" in together([0, 1, 1], 3)


def test_what_an_earlier_start_has_left_is_no_answer(rank: Any) -> None:
    """This holds for any ranks that came then, and any that come first now."""
    rank(0, 3)
    server = joining._open_store(0, 3, 1)
    assert all("have not started" in said for said in together([0, 1], 3, seconds=0.5))
    assert "rank 0 of 3 has not started" in together([2], 3, seconds=0.5)[0]
    words = [together(numbers, 3, seconds=5) for numbers in ([0, 1, 2], [2, 1, 0])]
    assert [len(set(found)) for found in words] == [1, 1]
    assert words[0] != words[1]
    del server


def test_without_rank_0_the_others_say_where_it_should_be(rank: Any) -> None:
    rank(1, 2)
    with pytest.raises(DeviceError) as caught:
        join("gloo", SHORT)
    place = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    assert f"rank 1 of 2 on {HOST} has waited 1 s for rank 0 at {place}" in caught.value.message


@pytest.mark.parametrize("told", ["soon", "0", "-1"])
def test_patience_is_a_number_of_seconds(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM3_START_TIMEOUT", told)
    with pytest.raises(ConfigError, match=f"GLM3_START_TIMEOUT={told} is no number"):
        patience()


def test_patience_is_ten_minutes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLM3_START_TIMEOUT", raising=False)
    assert patience() == 600


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
