"""Training checkpoints that are complete or absent, and whose damage is found.

Every rank writes its files into a folder aside and leaves their digests there; the manifest has
them all. The folder gets its name when all of it is on the disk.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from glm3cli.checkpoint.digests import file_digest
from glm3cli.checkpoint.manifest import MANIFEST, FileEntry, Manifest, read_manifest, versions
from glm3cli.checkpoint.staging import sync, sync_one
from glm3cli.errors import CheckpointError
from glm3cli.parallel.groups import Grid

_DIGESTS = ".digests-{}.json"


def write_and_digest(write: Callable[..., None], folder: Path, rank: int, *args: Any) -> None:
    """Lets megatron-core write this rank's files, and notes what they are."""
    write(*args)
    names = [path.name for path in folder.glob(f"__{rank}_*.distcp")]
    entries = {name: _entry(folder / name) for name in names}
    (folder / _DIGESTS.format(rank)).write_text(json.dumps(entries), "utf-8")


def publish(partial: Path, folder: Path, source: dict[str, Any]) -> None:
    """Writes the manifest of a finished folder, sends all to the disk, and gives it its name."""
    entries: dict[str, tuple[int, str]] = {}
    for path in sorted(partial.glob(_DIGESTS.format("*"))):
        entries |= json.loads(path.read_text("utf-8"))
        path.unlink()
    others = [path for path in partial.iterdir() if path.name not in entries]
    entries |= {path.name: _entry(path) for path in others}
    Manifest(
        source=source,
        settings={},
        versions=versions(),
        verified=False,
        non_finite=0,
        files={name: FileEntry(*entry) for name, entry in sorted(entries.items())},
        tensors={},
    ).write(partial)
    sync(partial)
    if folder.exists():  # of a run that has gone on from an earlier checkpoint
        remove(folder)
    partial.rename(folder)
    sync_one(folder.parent)


def remove(folder: Path) -> None:
    """Removes a checkpoint; what has the name of one is complete at every moment."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def damage(folder: Path, grid: Grid) -> str | None:
    """What of a checkpoint isn't as it was written, or None; every rank reads a part of it.

    A checkpoint without a manifest, of another program, is taken as it is.
    """
    try:
        files = read_manifest(folder).files if (folder / MANIFEST).is_file() else {}
        problem = None
    except CheckpointError as error:
        files, problem = {}, error.message
    for name in sorted(files)[grid.rank :: grid.world_size]:
        problem = problem or _difference(folder / name, files[name])
    found: list[str | None] = [None] * grid.world_size
    dist.all_gather_object(found, problem)
    return next((one for one in found if one), None)


def _difference(path: Path, entry: FileEntry) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{path.name} has {size:,} bytes instead of {entry.bytes:,}"
        if entry.sha256 is not None and file_digest(path) != entry.sha256:
            return f"{path.name} differs from what was written"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None


def _entry(path: Path) -> tuple[int, str]:
    return path.stat().st_size, file_digest(path)
