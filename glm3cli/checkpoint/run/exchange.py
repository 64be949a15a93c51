"""Brings files to the machines that lack them, over the process group.

It is the group in which all ranks train, which any backend has: one of the leaders alone would hold
buffers of its own on every device.
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
    """Brings each file to every storage that lacks it; all ranks call it.

    Args:
        source: The folder that is read from.
        target: The folder that is written to.
        files: Names, sizes and digests; some storage has each of them.
        held: The names that each storage has.
        storage: This rank's.

    Raises:
        OSError: A file can't be read or written, on any rank.
        CheckpointError: What arrived isn't what was written.
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
                    file = stack.enter_context((target / name).open("wb"))
            with together():
                _pass_on(file, name, entry, sender)


def _pass_on(file: BinaryIO | None, name: str, entry: FileEntry, sender: int) -> None:
    """Moves one file from its sender to the ranks that have opened one for it.

    Trouble is told after the last chunk only: a rank that left earlier would keep the others
    waiting.
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
    try:
        action(*args)
    except OSError as error:
        return error
    return None
