"""Connections between rank 0 and the first ranks of the other copies of the model.

Copies of a model that answer requests work at their own pace. What they tell each other can't go
through collectives, for which one copy would wait for the other.
"""

import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from threading import Thread
from typing import Any

import torch.distributed as dist

from glm3cli.errors import DeviceError
from glm3cli.parallel.groups import Grid
from glm3cli.parallel.join import patience, ranges

_KEY_BYTES = 32
_HERE = "127.0.0.1"
_LOOKING = 0.05  # seconds between two looks at who has come


def link_copies(grid: Grid) -> list[Connection]:
    """Connects rank 0 with the first rank of each other copy; all ranks must call it.

    What goes through a connection is pickled. A key that rank 0 makes up, and that only the ranks
    know, keeps others out.

    Returns:
        On rank 0 the connections to the copies, by their data parallel ranks from 1 on; on the
        first rank of another copy the one to rank 0; none on the other ranks.

    Raises:
        DeviceError: The ranks don't reach each other.
    """
    if grid.dp_size == 1:
        return []
    door = _Door(grid) if grid.rank == 0 else None
    told: list[Any] = [door and (door.address, door.key)]
    dist.broadcast_object_list(told, src=0)
    if door is not None:
        return door.wait(patience())
    if not grid.leads_copy:
        return []
    [(address, key)] = told
    try:
        connection = _reach(address, key)
    except OSError as error:
        raise DeviceError(
            f"rank {grid.rank} on {socket.gethostname()} can't reach rank 0 at {address[0]}:"
            f"{address[1]}: {error}",
            "open this machine's way to it: the ranks of a server talk through ports of their own",
        ) from error
    connection.send(grid.dp_rank)
    return [connection]


def _reach(address: tuple[str, int], key: bytes) -> Connection:
    """Connects to rank 0, and shows it the key.

    Raises:
        OSError: It can't be reached.
    """
    with socket.create_connection(address, timeout=patience()) as ours:
        ours.settimeout(None)
        _hurry(ours)
        connection = Connection(os.dup(ours.fileno()))
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    return connection


@dataclass
class _Visitor:
    """Somebody who has connected to rank 0.

    Attributes:
        socket: The connection, for what only sockets can do.
        connection: The same one, for messages.
        dp_rank: The data parallel rank of a copy that has shown the key; before that, None.
    """

    socket: socket.socket
    connection: Connection
    dp_rank: int | None = None

    def hear(self, key: bytes) -> None:
        """Asks for the key, and hears which copy it is; a stranger may never answer."""
        with suppress(AuthenticationError, EOFError, OSError):
            deliver_challenge(self.connection, key)
            answer_challenge(self.connection, key)
            self.dp_rank = self.connection.recv()

    def send_away(self) -> None:
        """Ends the connection, and a thread that still waits for an answer."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


@dataclass
class _Door:
    """The socket at which the other copies come to rank 0.

    Attributes:
        grid: The ranks.
        key: What they have to show.
        address: The address at which they reach rank 0.
    """

    grid: Grid
    key: bytes = field(default_factory=lambda: secrets.token_bytes(_KEY_BYTES))
    address: tuple[str, int] = field(init=False)

    def __post_init__(self) -> None:
        is_alone = _is_on_one_machine()
        self._server = _listen(_HERE if is_alone else "", self.grid.dp_size)
        self._server.settimeout(_LOOKING)
        port = self._server.getsockname()[1]
        self.address = (_HERE if is_alone else os.environ["MASTER_ADDR"], port)

    def wait(self, seconds: float) -> list[Connection]:
        """Waits for all other copies; returns the connections to them, by data parallel rank.

        Raises:
            DeviceError: One hasn't come in time.
        """
        end = time.monotonic() + seconds
        visitors: list[_Visitor] = []
        with self._server:
            while (missing := self._missing(visitors)) and time.monotonic() < end:
                self._let_in(visitors)
        strangers = [one for one in visitors if one.dp_rank is None]
        for one in visitors if missing else strangers:
            one.send_away()
        if missing:
            raise DeviceError(
                f"data parallel rank(s) {ranges(missing)} have not reached rank 0 at "
                f"{':'.join(map(str, self.address))} within {seconds:g} s",
                "open their machines' way to it: the ranks of a server talk through ports of their "
                "own; GLM3_START_TIMEOUT=SECONDS waits longer",
            )
        found = {one.dp_rank: one for one in visitors if one.dp_rank is not None}
        for one in found.values():
            _hurry(one.socket)
            one.socket.close()
        return [found[rank].connection for rank in sorted(found)]

    def _missing(self, visitors: list[_Visitor]) -> list[int]:
        """Returns the data parallel ranks of the copies that haven't come."""
        come = {one.dp_rank for one in visitors}
        return [rank for rank in range(1, self.grid.dp_size) if rank not in come]

    def _let_in(self, visitors: list[_Visitor]) -> None:
        """Waits a moment for another visitor, who is heard in a thread of his own."""
        with suppress(TimeoutError):
            theirs, _ = self._server.accept()
            one = _Visitor(theirs, Connection(os.dup(theirs.fileno())))
            visitors.append(one)
            Thread(target=one.hear, args=(self.key,), daemon=True).start()


def _listen(host: str, backlog: int) -> socket.socket:
    """Returns a socket that listens on a free port; without a host, to IPv4 and IPv6 alike."""
    if host or not socket.has_dualstack_ipv6():
        return socket.create_server((host, 0), backlog=backlog)
    return socket.create_server(
        (host, 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
    )


def _is_on_one_machine() -> bool:
    """Returns whether the launcher has started all ranks on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def _hurry(ours: socket.socket) -> None:
    """Has the system send each message at once, also before the one before it has arrived."""
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
