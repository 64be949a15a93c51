"""`Machine` answers what is on a machine, and `Finding` is one line of the doctor's report.

The answers come from files, environment variables, and packages' metadata. No package of a vendor
is imported and no device is opened. Tests make up machines of a folder and a dictionary.
"""

import os
import platform
import shutil
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "absent", "untried", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        subject: The thing that was looked for, such as a package or an environment variable.
        found: The version, value, or state that was found.
        verdict: `ok`; `absent` for something that the machine may do without; `untried` for what
            may work but isn't known to fit; `wrong` for what won't work.
        why: The rule that is broken; empty if none is.
        advice: What the user can do; empty if nothing is to be done.
    """

    subject: str
    found: str
    verdict: Verdict = "ok"
    why: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Machine:
    """A machine with its user; by default this one.

    Attributes:
        root: The folder that stands for the root of its file system.
        environment: Its environment variables.
        packages: Folders in which Python packages are looked for.
        python: Version of Python.
        architecture: The processor's architecture, such as x86_64 or aarch64.
        uid: The user's id.
        groups: Ids of the user's groups.
    """

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    packages: Sequence[str] = field(default_factory=lambda: sys.path)
    python: str = field(default_factory=platform.python_version)
    architecture: str = field(default_factory=platform.machine)
    uid: int = field(default_factory=os.getuid)
    groups: frozenset[int] = field(
        default_factory=lambda: frozenset({os.getgid(), *os.getgroups()})
    )

    def file(self, name: str) -> Path:
        """Returns the path of a file by its absolute name on the machine."""
        return self.root / name.lstrip("/")

    def read(self, path: Path) -> str:
        """Returns the text of a file; an empty one if it can't be read."""
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def distribution(self, package: str) -> Distribution | None:
        """Returns a package's metadata, or None if it isn't installed."""
        return next(iter(distributions(name=package, path=list(self.packages))), None)

    def installed(self, package: str) -> str | None:
        """Returns a package's version, or None if it isn't installed."""
        found = self.distribution(package)
        return found.version if found else None

    def source_of(self, module: str) -> Path | None:
        """Returns the folder that holds a module, or None if it isn't found.

        It finds modules that have no package metadata, such as a checkout on the path.
        """
        spec = PathFinder.find_spec(module, list(self.packages))
        places = spec.submodule_search_locations if spec else None
        return Path(next(iter(places))).parent if places else None

    def exported(self, name: str) -> str | None:
        """Returns a variable as the user's shell has it, whatever this process has set since."""
        started = self.read(self.file("/proc/self/environ"))
        if not started:
            return self.environment.get(name)
        return dict(item.partition("=")[::2] for item in started.split("\0")).get(name)

    def program(self, name: str) -> str | None:
        """Returns the path of a program that the user's PATH finds, or None."""
        return shutil.which(name, path=self.environment.get("PATH", ""))

    def free(self, folder: Path) -> int:
        """Returns the free bytes of the disk that holds a folder; 0 if it doesn't exist."""
        return shutil.disk_usage(folder).free if folder.is_dir() else 0

    def may_open(self, path: Path) -> bool:
        """Returns whether the file's mode lets the user read and write it."""
        if self.uid == 0:
            return True
        about = path.stat()
        if about.st_uid == self.uid:
            needed = stat.S_IRUSR | stat.S_IWUSR
        elif about.st_gid in self.groups:
            needed = stat.S_IRGRP | stat.S_IWGRP
        else:
            needed = stat.S_IROTH | stat.S_IWOTH
        return about.st_mode & needed == needed
