"""Brings the ranks together, or says which of them are missing.

torch's own rendezvous only tells that it has waited too long. Here every rank first leaves its
host's name in the store, so that whoever is left waiting can name those that never came.
"""

import os
import socket
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from glm3cli.errors import ConfigError, DeviceError

_DEFAULT_PATIENCE = 600.0  # seconds
_VARIABLE = "GLM3_START_TIMEOUT"


def join(backend: str, timeout: timedelta) -> None:
    """Starts torch.distributed's default group of the ranks in the environment, or of one alone.

    Args:
        backend: torch.distributed's.
        timeout: Of the collectives that follow.

    Raises:
        ConfigError: The environment's patience is no number of seconds.
        DeviceError: Not all ranks came.
    """
    if "RANK" not in os.environ:
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not exported
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        store = _open_store(rank, world_size, patience())
        _meet(store, rank, world_size, patience())
        store.set_timeout(timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    except (KeyError, ValueError, RuntimeError) as error:
        raise DeviceError(
            f"rank {rank} of {world_size} can't join the others: {error}",
            "start every rank with torchrun, with the same --rdzv-endpoint on every machine",
        ) from error


def patience() -> float:
    """Seconds that ranks wait for each other at the start."""
    told = os.environ.get(_VARIABLE, str(_DEFAULT_PATIENCE))
    try:
        seconds = float(told)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise ConfigError(f"{_VARIABLE}={told} is no number of seconds above 0", "mend or unset it")
    return seconds


def _open_store(rank: int, world_size: int, seconds: float) -> Any:
    """The store of all ranks: torchrun's, or one that rank 0 opens."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not exported
            host,
            port,
            world_size,
            is_master=rank == 0 and not is_torchruns,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,  # it would wait without a name
            multi_tenant=True,
        )
    except RuntimeError as error:
        if rank == 0:
            raise
        raise DeviceError(
            f"rank {rank} of {world_size} on {socket.gethostname()} has waited {seconds:g} s for "
            f"rank 0 at {host}:{port}: {str(error).splitlines()[0]}",
            "start rank 0 there, and see that this port can be reached from here",
        ) from error
    # torchrun may keep its store when it starts the ranks anew.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"glm3/{attempt}", store)  # type: ignore[attr-defined]


def _meet(store: Any, rank: int, world_size: int, seconds: float) -> None:
    """Returns when all ranks are here."""
    host = socket.gethostname()
    if store.add(f"starts/{rank}", 1) > 1:
        other = store.get(f"host/{rank}").decode()
        raise DeviceError(
            f"rank {rank} was started twice: on {other} and on {host}",
            "give every machine its own --node_rank, or use --rdzv-backend c10d",
        )
    store.set(f"host/{rank}", host)
    if store.add("here", 1) == world_size:
        store.set("complete", "")
    try:
        store.wait(["complete"], timedelta(seconds=seconds))
    except RuntimeError as error:
        raise _missing(store, world_size, seconds) from error


def _missing(store: Any, world_size: int, seconds: float) -> DeviceError:
    """Names the ranks that did not come, and the hosts of those that did."""
    hosts: dict[str, list[int]] = {}
    missing = []
    for rank in range(world_size):
        if store.check([f"host/{rank}"]):
            hosts.setdefault(store.get(f"host/{rank}").decode(), []).append(rank)
        else:
            missing.append(rank)
    here = "; ".join(f"{ranges(ranks)} on {host}" for host, ranks in hosts.items())
    return DeviceError(
        f"{len(missing)} of {world_size} ranks have not started within {seconds:g} s: "
        f"{ranges(missing)} (here are {here})",
        "see what the machines of the missing ranks say; if they only need longer, set "
        f"{_VARIABLE} to more seconds on all machines",
    )


def ranges(numbers: Iterable[int]) -> str:
    """Numbers that go up, in words: `0-7, 9`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
