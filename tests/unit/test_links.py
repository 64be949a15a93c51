"""Rank 0 waits for the other copies of the model, whoever else connects."""

import socket
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from glm3cli.errors import DeviceError
from glm3cli.parallel import links


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rank 0 of three copies of a model."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("WORLD_SIZE", "3")
    return links._Door(SimpleNamespace(dp_size=3))  # type: ignore[arg-type]


def come(door: Any, dp_rank: int, answers: list[Any]) -> Thread:
    """Comes as a copy, and notes what it is told."""

    def talk() -> None:
        with links._reach(door.address, door.key) as connection:
            connection.send(dp_rank)
            answers.append(connection.recv())

    thread = Thread(target=talk)
    thread.start()
    return thread


def test_strangers_hold_nobody_up(door: Any) -> None:
    answers: list[Any] = []
    with socket.create_connection(door.address) as silent, socket.create_connection(door.address):
        with socket.create_connection(door.address) as rude:
            rude.sendall(b"GET / HTTP/1.1\r\n\r\n" * 9)
        threads = [come(door, rank, answers) for rank in (2, 1)]
        for number, connection in enumerate(door.wait(60), 1):
            connection.send(number)
        for thread in threads:
            thread.join()
        silent.settimeout(60)
        while silent.recv(4096):  # the challenge, and the end
            pass
    assert sorted(answers) == [1, 2]


def test_who_does_not_come_is_named(door: Any) -> None:
    answers: list[Any] = []

    def come_alone() -> None:
        with links._reach(door.address, door.key) as connection:
            connection.send(1)
            with pytest.raises((EOFError, ConnectionError)):
                answers.append(connection.recv())

    thread = Thread(target=come_alone)
    thread.start()
    with pytest.raises(DeviceError, match=r"rank\(s\) 2 have not reached rank 0 at 127.0.0.1:\d+"):
        door.wait(1)
    thread.join()
    assert answers == []


def test_a_wrong_key_is_refused(door: Any) -> None:
    def come_with_another_key() -> None:
        with pytest.raises((EOFError, ConnectionError, links.AuthenticationError)):
            links._reach(door.address, b"another").recv()

    thread = Thread(target=come_with_another_key)
    thread.start()
    with pytest.raises(DeviceError, match=r"1-2 have not"):
        door.wait(1)
    thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_machines_are_reached_by_either_protocol(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", host)
    door = links._Door(SimpleNamespace(dp_size=2))  # type: ignore[arg-type]
    answers: list[Any] = []
    thread = come(door, 1, answers)
    [connection] = door.wait(60)
    connection.send("hello")
    thread.join()
    assert answers == ["hello"]
