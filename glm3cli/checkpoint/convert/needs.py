"""What a conversion needs of the disk and of the memory: said first, and checked."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm3cli.checkpoint.convert.progress import PrivateMemory
from glm3cli.errors import ConfigError

# Headers, config.json, the tokenizer and the manifest of a large model.
_COMPANION_BYTES = 16 * 2**20
# The tensor as it was read, cast, and cut or joined, and the parts of one of these in a buffer.
_COPIES = 4
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


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
    free = shutil.disk_usage(_existing_parent(target.resolve())).free
    available = _available_memory()
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


def _available_memory() -> int | None:
    """Bytes that this process could have for itself, where Linux tells it."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    values = dict(line.split(":", 1) for line in info.read_text("ascii").splitlines())
    amounts = [int(values[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree")]
    limit = _cgroup_memory()
    return sum(amounts) if limit is None else min(sum(amounts), limit)


def _cgroup_memory() -> int | None:
    """What the limits of a container leave; its page cache can be dropped and doesn't count."""
    left = [
        amount
        for folder, limit, used in _cgroup_folders()
        if (amount := _left_in(folder, limit, used)) is not None
    ]
    return min(left, default=None)


def _cgroup_folders() -> Iterator[tuple[Path, str, str]]:
    """This process's control groups for memory and those around them, of version 2 and of 1.

    Each with the name of the file with its limit, and of the amount in memory.stat that is used.
    """
    try:
        lines = _OWN_CGROUPS.read_text("ascii").splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            root, names = _CGROUP, ("memory.max", "anon")
        elif "memory" in controllers.split(","):
            root, names = _CGROUP / "memory", ("memory.limit_in_bytes", "total_rss")
        else:
            continue
        # In a container the path may be that of the host, of which only the root is seen.
        inner = root / path.lstrip("/")
        for folder in dict.fromkeys((inner, *inner.parents)):
            if folder.is_relative_to(root):
                yield folder, *names


def _left_in(folder: Path, limit: str, used: str) -> int | None:
    try:
        most = int((folder / limit).read_text("ascii"))
        stat = (folder / "memory.stat").read_text("ascii")
        line = next(line for line in stat.splitlines() if line.startswith(f"{used} "))
    except (OSError, ValueError, StopIteration):  # no such group, or one without a limit
        return None
    return most - int(line.split()[1])


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())
