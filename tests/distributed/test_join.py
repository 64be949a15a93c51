"""How the ranks find each other at the start, and who is named when they don't."""

import os
import socket
import threading
from datetime import timedelta
from typing import Any

import pytest

from glm3cli.errors import ConfigError, DeviceError
from glm3cli.parallel import join as joining
from glm3cli.parallel.join import join, patience, ranges

SHORT = timedelta(seconds=20)
HOST = socket.gethostname()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


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


def test_some_ranks_are_there(rank: Any) -> None:
    rank(0, 5)
    store = joining._open_store(0, 5, 1)
    others = [
        threading.Thread(target=pytest.raises, args=(DeviceError, joining._meet, store, n, 5, 1))
        for n in (1, 3)
    ]
    for other in others:
        other.start()
    with pytest.raises(DeviceError, match=r"2 of 5 .* 2, 4 \(here are 0-1, 3 on "):
        joining._meet(store, 0, 5, 1)
    for other in others:
        other.join()


def test_without_rank_0_the_others_say_where_it_should_be(rank: Any) -> None:
    rank(1, 2)
    with pytest.raises(DeviceError) as caught:
        join("gloo", SHORT)
    place = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    assert f"rank 1 of 2 on {HOST} has waited 1 s for rank 0 at {place}" in caught.value.message


def test_a_rank_that_was_started_twice(rank: Any) -> None:
    rank(0, 2)
    store = joining._open_store(0, 2, 1)
    store.add("starts/1", 1)
    store.set("host/1", "elsewhere")
    with pytest.raises(DeviceError, match=f"rank 1 was started twice: on elsewhere and on {HOST}"):
        joining._meet(store, 1, 2, 1)


def test_ranks_of_a_second_attempt_do_not_meet_those_of_the_first(
    rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank(0, 1)
    store = joining._open_store(0, 1, 1)
    joining._meet(store, 0, 1, 1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # the first one plays torchrun
    joining._meet(joining._open_store(0, 1, 1), 0, 1, 1)


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
