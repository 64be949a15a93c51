"""Sends files to the machines that lack them, over the process group in which all ranks train.

Every backend has that group. A smaller one, of the storages' leaders alone, would hold buffers of
its own on every device.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from glm3cli.checkpoint.files.manifest import FileEntry
from glm3cli.checkpoint.scratch import bytes_of
from glm3cli.device import require_active
from glm3cli.errors import CheckpointError
from glm3cli.parallel.storage import Storage, together

_CHUNK = 2**25  # bytes; a device has room for them beside a model


def exchange(
    source: Path,
    target: Path,
    files: Mapping[str, FileEntry],
    held: Sequence[Collection[str]],
    storage: Storage,
) -> None:
    """Sends each file to every storage that lacks it; all ranks must call it.

    Args:
        source: The folder that files are read from.
        target: The folder that files are written to.
        files: The size and digest of each file, by its name; at least one storage has it.
        held: The names of the files that each storage has.
        storage: The storage of this rank.

    Raises:
        OSError: A file can't be read or written, on any rank.
        CheckpointError: The bytes that arrived aren't those that were written.
    """
    for name, entry in sorted(files.items()):
        holders = [i for i, names in enumerate(held) if name in names]
        if len(holders) == len(held):
            continue
        sender = storage.leaders[holders[0]]
        with ExitStack() as stack:
            file: BinaryIO | None = None
            with together():
                if storage.rank == sender:
                    file = stack.enter_context((source / name).open("rb"))
                elif storage.is_leader and storage.index not in holders:
                    (target / name).parent.mkdir(exist_ok=True)
                    file = stack.enter_context((target / name).open("wb"))
            with together():
                _pass_on(file, name, entry, sender)


def _pass_on(file: BinaryIO | None, name: str, entry: FileEntry, sender: int) -> None:
    """Broadcasts one file; all ranks must call it.

    A problem is raised after the last chunk only: a rank that left earlier would keep the others
    waiting.

    Args:
        file: The file to read on the sender, the file to write on the ranks that lack it, and None
            on all others.
        name: The file's name, for messages.
        entry: The file's size and digest.
        sender: The rank that has the file.
    """
    is_sender = dist.get_rank() == sender
    device, digest = require_active().torch_device(), hashlib.sha256()
    buffer = torch.empty(min(_CHUNK, entry.bytes), dtype=torch.uint8)
    problem: OSError | None = None
    for start in range(0, entry.bytes, _CHUNK):
        part = buffer[: entry.bytes - start]
        if file and is_sender:
            problem = problem or _trouble(file.readinto, part.numpy())  # type: ignore[attr-defined]
        sent = part.to(device)
        dist.broadcast(sent, sender)
        if file and not is_sender:
            part.copy_(sent)
            digest.update(bytes_of(part))
            problem = problem or _trouble(file.write, part.numpy())
    if file and not is_sender:
        problem = problem or _trouble(file.flush)
    if problem:
        raise problem
    if file and not is_sender and entry.sha256 not in (None, digest.hexdigest()):
        raise CheckpointError(
            f"{name} came from rank {sender} other than it was written",
            "run the same command again; if that doesn't help, resume from an older checkpoint",
        )


def _trouble(action: Callable[..., Any], *args: Any) -> OSError | None:
    """Calls `action` and returns the OSError that it raised, or None."""
    try:
        action(*args)
    except OSError as error:
        return error
    return None
