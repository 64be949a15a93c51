"""Estimates what a conversion needs of the disk and of the memory, prints and checks it."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from glm3cli.errors import ConfigError
from glm3cli.host.files import existing_parent
from glm3cli.host.memory import PrivateMemory, available_memory

# Headers, config.json, the tokenizer and the manifest of a large model.
_COMPANION_BYTES = 16 * 2**20
# A tensor as it was read, cast, and cut or joined, and the parts of one of these in a buffer.
_COPIES = 4


@dataclass(frozen=True)
class Needs:
    """What a conversion needs.

    Attributes:
        disk: The size of the new folder, in bytes.
        memory: An estimate of the private memory of the process, in bytes.
    """

    disk: int
    memory: int


def needs_of(weights: int, largest: int, loaded: int = 0) -> Needs:
    """Estimates what a conversion needs.

    Args:
        weights: The size of all new tensors, in bytes.
        largest: The size of the largest tensor in the widest type that it takes on its way, in
            bytes.
        loaded: The memory that the verification takes after the tensors are written, in bytes.
    """
    memory = PrivateMemory().sample() + max(_COPIES * largest, loaded)
    return Needs(weights + _COMPANION_BYTES, memory)


def check_needs(target: Path, needs: Needs) -> None:
    """Prints on stderr what is needed and what there is, and compares the two.

    Args:
        target: The new folder, which need not exist.
        needs: What the conversion needs.

    Raises:
        ConfigError: The disk has too little space, or the machine too little memory.
    """
    free = shutil.disk_usage(existing_parent(target.resolve().parent)).free
    available = available_memory()
    memory = "" if available is None else f" ({_gb(available)} available)"
    sys.stderr.write(
        f"needs {_gb(needs.disk)} of disk ({_gb(free)} free) and about {_gb(needs.memory)} of "
        f"memory{memory}\n"
    )
    if free < needs.disk:
        raise ConfigError(
            f"{target} needs {_gb(needs.disk)}, but the disk has {_gb(free)} free",
            "free some space, or choose a folder on another disk",
        )
    if available is not None and available < needs.memory:
        raise ConfigError(
            f"the conversion needs about {_gb(needs.memory)} of memory, but only {_gb(available)} "
            "is available",
            "end other programs, or use a machine with more",
        )


def _gb(num_bytes: int) -> str:
    """Returns a number of bytes in GB (10^9 bytes), as it is printed."""
    return f"{num_bytes / 1e9:.2f} GB"
