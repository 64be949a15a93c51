"""Names the folders of the sample indices that `glm3 preprocess --build-index` has built.

A sample index of megatron-core's GPTDataset says which tokens of which documents form each sample.
PREFIX.samples/ has one folder for each combination of data and settings. A training that finds no
folder for exactly its own builds its indices itself.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = "samples"


def index_folder(prefix: str, settings: dict[str, Any]) -> Path:
    """Returns the folder for the indices of a pair of token files in its present state.

    Args:
        prefix: The path of the token files without `.bin` and `.idx`.
        settings: Everything else that the indices depend on, as JSON values.
    """
    path = Path(prefix).absolute()
    files = []
    for ending in ("idx", "bin"):
        stat = path.with_name(f"{path.name}.{ending}").stat()
        files.append([stat.st_size, stat.st_mtime_ns])
    # The version, because megatron-core may name or fill its files otherwise in another one.
    key = json.dumps([str(path), files, settings, version("megatron-core")], sort_keys=True)
    folder = indices_of(path)
    return folder / hashlib.sha256(key.encode()).hexdigest()[:16]


def indices_of(prefix: Path) -> Path:
    """Returns the folder that holds all sample indices of a pair of token files."""
    return prefix.with_name(f"{prefix.name}.{FOLDER}")
