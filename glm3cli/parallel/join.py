"""Brings the ranks of a run together, or says which of them are missing.

torch's own rendezvous only says that it has waited too long. Here every rank first writes its
host's name into the store that all ranks share, so that a rank that is left waiting can name those
that never came.

torchrun keeps its store when it starts the ranks again (torch 2.13, elastic/rendezvous), and its
machines may count restarts differently. What an earlier start has left in the store must not be
taken for an answer: rank 0 makes up a random word for each start, under which all its keys stand,
and gives it to the ranks that ask now.
"""

import os
import socket
import time
import uuid
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from glm3cli.errors import ConfigError, DeviceError
from glm3cli.host.environment import number_of

_DEFAULT_PATIENCE = 600.0  # seconds
_VARIABLE = "GLM3_START_TIMEOUT"


def join(backend: str, timeout: timedelta) -> None:
    """Starts torch.distributed's default group with the ranks that the environment describes.

    Without a launcher (no RANK in the environment) the group has one rank.

    Args:
        backend: Name of torch.distributed's backend.
        timeout: Longest duration of a collective of the group.

    Raises:
        ConfigError: GLM3_START_TIMEOUT is no number of seconds, or RANK or WORLD_SIZE no number.
        DeviceError: A rank is missing, was started twice, or can't reach the others.
    """
    if not os.environ.get("RANK"):
        alone = dist.HashStore()  # type: ignore[attr-defined]  # public, but not exported
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
        return
    rank, world_size = number_of("RANK", 0), number_of("WORLD_SIZE", 1)
    try:
        store = _open_store(rank, world_size, patience())
        word = _meet(store, rank, world_size, patience())
        store = dist.PrefixStore(word, store)  # type: ignore[attr-defined]
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
    """Returns the seconds that ranks wait for each other at the start (GLM3_START_TIMEOUT).

    Raises:
        ConfigError: The variable is no number above 0.
    """
    value = os.environ.get(_VARIABLE, str(_DEFAULT_PATIENCE))
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise ConfigError(
            f"{_VARIABLE}={value} is no number of seconds above 0", "mend or unset it"
        )
    return seconds


def _open_store(rank: int, world_size: int, seconds: float) -> Any:
    """Opens the store that all ranks share: torchrun's, or one that rank 0 serves.

    Raises:
        DeviceError: Rank 0 can't be reached.
    """
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
    return dist.PrefixStore("glm3", store)  # type: ignore[attr-defined]


def _meet(store: Any, rank: int, world_size: int, seconds: float) -> str:
    """Waits until all ranks are here, and returns the word of this start.

    Raises:
        DeviceError: This rank was started twice, or ranks are missing.
    """
    word = uuid.uuid4().hex if rank == 0 else _ask(store, rank, world_size, seconds)
    host = socket.gethostname()
    if store.add(f"{word}/starts/{rank}", 1) > 1:
        other = store.get(f"{word}/host/{rank}").decode()
        raise DeviceError(
            f"rank {rank} was started twice: on {other} and on {host}",
            "give every machine its own --node_rank, or use --rdzv-backend c10d",
        )
    store.set(f"{word}/host/{rank}", host)
    if store.add(f"{word}/here", 1) == world_size:
        store.set(f"{word}/complete", "")
    if rank == 0:
        _answer(store, word, seconds)
    try:
        store.wait([f"{word}/complete"], timedelta(seconds=0.1 if rank == 0 else seconds))
    except RuntimeError as error:
        raise _missing(store, word, world_size, seconds) from error
    return word


def _ask(store: Any, rank: int, world_size: int, seconds: float) -> str:
    """Asks rank 0 for the word of this start, under a key that only this process knows.

    Raises:
        DeviceError: Rank 0 hasn't answered in time.
    """
    question = uuid.uuid4().hex
    store.set(f"question/{store.add('questions', 1)}", question)
    try:
        store.wait([f"answer/{question}"], timedelta(seconds=seconds))
    except RuntimeError as error:
        raise DeviceError(
            f"rank 0 of {world_size} has not started within {seconds:g} s; rank {rank} waits for "
            f"it on {socket.gethostname()}",
            "see what the machine of rank 0 says; if it only needs longer, set "
            f"{_VARIABLE} to more seconds on all machines",
        ) from error
    return str(store.get(f"answer/{question}").decode())


def _answer(store: Any, word: str, seconds: float) -> None:
    """Gives the word to all ranks that ask, until every rank is here or time is up."""
    deadline = time.monotonic() + seconds
    known, open_numbers = 0, set[int]()
    while not store.check([f"{word}/complete"]) and time.monotonic() < deadline:
        count = store.add("questions", 0)
        open_numbers |= set(range(known + 1, count + 1))
        known = count
        for number in [n for n in open_numbers if store.check([f"question/{n}"])]:
            store.set(f"answer/{store.get(f'question/{number}').decode()}", word)
            open_numbers.remove(number)
        time.sleep(0.02)


def _missing(store: Any, word: str, world_size: int, seconds: float) -> DeviceError:
    """Returns the error that names the ranks that did not come, and the hosts of those that did."""
    hosts: dict[str, list[int]] = {}
    missing = []
    for rank in range(world_size):
        if store.check([f"{word}/host/{rank}"]):
            hosts.setdefault(store.get(f"{word}/host/{rank}").decode(), []).append(rank)
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
    """Returns increasing numbers as text with runs joined, such as `0-7, 9`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
