"""Memory of this machine and this process: what there is, and what a container's limits leave."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Limit:
    """The limit of one control group that this process is in (kernel.org: cgroup-v2, cgroup-v1).

    Attributes:
        total: Bytes that the processes of the group may have in memory.
        used: Bytes that they have; page cache, which can be dropped, isn't counted.
    """

    total: int
    used: int

    @property
    def left(self) -> int:
        """Bytes that the group may still take."""
        return self.total - self.used


def total_memory() -> int:
    """Bytes of the machine's memory, or of the tightest limit around this process."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([whole, *(limit.total for limit in limits())])


def available_memory() -> int | None:
    """Bytes that this process could have for itself; None where the system isn't Linux."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    values = dict(line.split(":", 1) for line in info.read_text("ascii").splitlines())
    amounts = [int(values[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree")]
    return min([sum(amounts), *(limit.left for limit in limits())])


def limits() -> Iterator[Limit]:
    """The memory limits of the control groups around this process, of version 2 and of 1."""
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
            if folder.is_relative_to(root) and (found := _limit_of(folder, *names)):
                yield found


def _limit_of(folder: Path, limit: str, used: str) -> Limit | None:
    """The limit in a group's file `limit`, with the amount `used` of its memory.stat."""
    try:
        total = int((folder / limit).read_text("ascii"))
        stat = (folder / "memory.stat").read_text("ascii")
        line = next(line for line in stat.splitlines() if line.startswith(f"{used} "))
    except (OSError, ValueError, StopIteration):  # no such group, or one without a limit
        return None
    return Limit(total, int(line.split()[1]))


class PrivateMemory:
    """The private (not file-backed) memory of this process.

    Attributes:
        peak: The highest number of bytes at the times that `sample` was called.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.peak = 0

    def sample(self) -> int:
        """Bytes of private memory now; of all memory where the system doesn't tell them apart.

        Mapped pages of a file can be dropped at any time, so they don't count.
        """
        memory = self._process.memory_info()
        now = int(memory.rss - getattr(memory, "shared", 0))
        self.peak = max(self.peak, now)
        return now
