"""`Machine`: what is here, read from files, the environment, and the packages' metadata.

Nothing of a vendor is imported, and no device is opened. A folder and a dictionary make a machine
that isn't there.
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
    """One line of the report.

    Attributes:
        verdict: `ok`; `absent` for something that this machine may do without; `untried` for what
            may work but isn't what fits for certain; `wrong` for what won't work.
        why: The rule that is broken.
        advice: The way out, where there is something to mend.
    """

    subject: str
    found: str
    verdict: Verdict = "ok"
    why: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Machine:
    """A machine, by default this one.

    Attributes:
        root: Where its files begin.
        packages: Folders in which Python packages are looked for.
        python: Its version.
        uid: Of the user.
        groups: The ids of the user's groups.
    """

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    packages: Sequence[str] = field(default_factory=lambda: sys.path)
    python: str = field(default_factory=platform.python_version)
    uid: int = field(default_factory=os.getuid)
    groups: frozenset[int] = field(
        default_factory=lambda: frozenset({os.getgid(), *os.getgroups()})
    )

    def file(self, name: str) -> Path:
        """The place of an absolute file name on this machine."""
        return self.root / name.lstrip("/")

    def read(self, path: Path) -> str:
        """The text of a file; empty where it can't be read."""
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def distribution(self, package: str) -> Distribution | None:
        """An installed package's metadata."""
        return next(iter(distributions(name=package, path=list(self.packages))), None)

    def installed(self, package: str) -> str | None:
        """An installed package's version."""
        found = self.distribution(package)
        return found.version if found else None

    def source_of(self, module: str) -> Path | None:
        """The folder that holds a module, where it is found without its package's metadata."""
        spec = PathFinder.find_spec(module, list(self.packages))
        places = spec.submodule_search_locations if spec else None
        return Path(next(iter(places))).parent if places else None

    def program(self, name: str) -> str | None:
        """Where a program lies on the user's PATH."""
        return shutil.which(name, path=self.environment.get("PATH", ""))

    def free(self, folder: Path) -> int:
        """Bytes that are free in a folder; 0 where it doesn't exist."""
        return shutil.disk_usage(folder).free if folder.is_dir() else 0

    def may_open(self, path: Path) -> bool:
        """Whether the file's mode lets the user read and write it."""
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
