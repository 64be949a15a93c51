"""Connections between rank 0 and the first ranks of the other copies of the model.

Copies of a model that answer requests work at their own pace. What they tell each other can't go
through collectives, for which one copy would wait for the other.
"""

import os
import secrets
import socket
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch.distributed as dist

from glm3cli.errors import DeviceError
from glm3cli.parallel.groups import Grid

_KEY_BYTES = 32
_HERE = "127.0.0.1"


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
    listener, key = _listen(grid) if grid.rank == 0 else (None, b"")
    told: list[Any] = [None if listener is None else (_address(listener), key)]
    dist.broadcast_object_list(told, src=0)
    if listener is not None:
        with listener:
            found = dict(_accept(listener) for _ in range(grid.dp_size - 1))
        return [found[rank] for rank in sorted(found)]
    if not grid.leads_copy:
        return []
    [(address, key)] = told
    try:
        connection = Client(address, authkey=key)
    except OSError as error:
        raise DeviceError(
            f"rank {grid.rank} on {socket.gethostname()} can't reach rank 0 at {address[0]}:"
            f"{address[1]}: {error}",
            "open this machine's way to it: the ranks of a server talk through ports of their own",
        ) from error
    connection.send(grid.dp_rank)
    return [_without_delay(connection)]


def _is_on_one_machine() -> bool:
    """Returns whether the launcher has started all ranks on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def _listen(grid: Grid) -> tuple[Listener, bytes]:
    """Listens where the other ranks reach rank 0; returns the key that they need, too."""
    key = secrets.token_bytes(_KEY_BYTES)
    host = _HERE if _is_on_one_machine() else ""
    return Listener((host, 0), backlog=grid.dp_size, authkey=key), key


def _address(listener: Listener) -> tuple[str, int]:
    """Returns the address at which the other ranks reach a listener."""
    host, port = listener.address
    return (_HERE if host == _HERE else os.environ["MASTER_ADDR"]), port


def _accept(listener: Listener) -> tuple[int, Connection]:
    """Returns the data parallel rank of the next copy that comes, and the connection to it."""
    while True:
        with suppress(AuthenticationError, EOFError, ConnectionError):  # somebody else
            connection = listener.accept()
            return connection.recv(), _without_delay(connection)


def _without_delay(connection: Connection) -> Connection:
    """Has the system send each message at once, also before the one before it has arrived."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
