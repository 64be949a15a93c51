"""Where the sample indices of text are kept that `preprocess --build-index` has built.

Training builds them itself where there are none for exactly its data and settings.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = "samples"


def index_folder(prefix: str, told: dict[str, Any]) -> Path:
    """The folder for a pair of files as they are now.

    Args:
        prefix: Of the files.
        told: All that the indices depend on besides; JSON values.
    """
    path = Path(prefix).absolute()
    files = []
    for kind in ("idx", "bin"):
        stat = path.with_name(f"{path.name}.{kind}").stat()
        files.append([stat.st_size, stat.st_mtime_ns])
    # megatron-core names its files by more than what is told here: another one finds none.
    key = json.dumps([str(path), files, told, version("megatron-core")], sort_keys=True)
    folder = indices_of(path)
    return folder / hashlib.sha256(key.encode()).hexdigest()[:16]


def indices_of(prefix: Path) -> Path:
    """The folder of all indices of a pair of files."""
    return prefix.with_name(f"{prefix.name}.{FOLDER}")
