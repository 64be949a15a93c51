"""The memory of this machine and of this process, and what a container's limits leave of it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Limit:
    """The memory limit of a control group of this process (kernel.org: cgroup-v2, cgroup-v1).

    Attributes:
        total: Bytes that the processes of the group may use together.
        used: Bytes that they use; page cache, which can be dropped, isn't counted.
    """

    total: int
    used: int

    @property
    def left(self) -> int:
        """The bytes that the group may still take."""
        return self.total - self.used


def total_memory() -> int:
    """Returns the machine's memory in bytes, or the tightest limit around this process."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([whole, *(limit.total for limit in limits())])


def available_memory() -> int | None:
    """Returns the bytes that this process could still take; None if the system isn't Linux."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    values = dict(line.split(":", 1) for line in info.read_text("ascii").splitlines())
    amounts = [int(values[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree")]
    return min([sum(amounts), *(limit.left for limit in limits())])


def limits() -> Iterator[Limit]:
    """Yields the memory limits of the control groups around this process, of versions 1 and 2."""
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
    """Reads the limit of a control group; None if there is no such group, or it has no limit.

    Args:
        folder: The group's folder.
        limit: Name of the file that has the limit.
        used: Name of the amount in memory.stat that is used.
    """
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
        """Returns the bytes of private memory now, and remembers the peak.

        Mapped pages of a file can be dropped at any time, so they don't count, except where the
        system doesn't count them apart.
        """
        memory = self._process.memory_info()
        now = int(memory.rss - getattr(memory, "shared", 0))
        self.peak = max(self.peak, now)
        return now
