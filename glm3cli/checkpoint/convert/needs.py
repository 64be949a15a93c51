"""What a conversion needs of the disk and of the memory: said first, and checked."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from glm3cli.errors import ConfigError
from glm3cli.host.files import existing_parent
from glm3cli.host.memory import PrivateMemory, available_memory

# Headers, config.json, the tokenizer and the manifest of a large model.
_COMPANION_BYTES = 16 * 2**20
# The tensor as it was read, cast, and cut or joined, and the parts of one of these in a buffer.
_COPIES = 4


@dataclass(frozen=True)
class Needs:
    """Bytes of disk, and an estimate of the bytes of private memory."""

    disk: int
    memory: int


def needs_of(weights: int, largest: int) -> Needs:
    """What a conversion needs.

    Args:
        weights: Bytes of all new tensors.
        largest: Bytes of the largest tensor in the widest type on its way.
    """
    return Needs(weights + _COMPANION_BYTES, PrivateMemory().sample() + _COPIES * largest)


def check_needs(target: Path, needs: Needs) -> None:
    """Prints what is needed and what there is.

    Raises:
        ConfigError: There is too little.
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
    return f"{num_bytes / 1e9:.2f} GB"
