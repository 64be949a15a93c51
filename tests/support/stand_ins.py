"""Processes of their own with modules that stand in for others."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` in a fresh process, with `folder` first on its path."""
    path = os.pathsep.join(str(item) for item in (folder, ROOT) if item)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), "pretrain", "--tp", "2"],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def stand_in(folder: Path, **sources: str) -> Path:
    """Modules by dotted name (`__` for the dot) and source, as files in `folder`."""
    for name, source in sources.items():
        *packages, module = name.split("__")
        place = folder
        for package in packages:
            place = place / package
            place.mkdir(exist_ok=True)
            (place / "__init__.py").touch()
        if (place / module).is_dir():
            (place / module / "__init__.py").write_text(textwrap.dedent(source))
        else:
            (place / f"{module}.py").write_text(textwrap.dedent(source))
    return folder
