"""Training checkpoints that are complete or absent, and whose damage is found.

Every rank writes its files into a folder aside and leaves their digests there; the manifest has
them all. The folder gets its name when all of it is on the disk.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from glm3cli.checkpoint.files.digests import file_digest
from glm3cli.checkpoint.files.manifest import MANIFEST, FileEntry, Manifest, manifest_versions
from glm3cli.checkpoint.run.exchange import exchange
from glm3cli.host.files import sync, sync_one
from glm3cli.parallel.storage import Storage, first, tell, together

_DIGESTS = ".digests-{}.json"


def write_and_digest(write: Callable[..., None], folder: Path, rank: int, *args: Any) -> None:
    """Lets megatron-core write this rank's files, and notes what they are."""
    write(*args)
    names = [path.name for path in folder.glob(f"__{rank}_*.distcp")]
    entries = {name: astuple(_entry(folder / name)) for name in names}
    (folder / _DIGESTS.format(rank)).write_text(json.dumps(entries), "utf-8")


def publish(partial: Path, folder: Path, source: dict[str, Any], storage: Storage) -> None:
    """Completes a finished folder, sends all to the disk, and gives it its name.

    All ranks call it. Where machines have disks of their own, each keeps what its ranks wrote. The
    manifest is the same everywhere and lists all; what is no rank's own, rank 0 gives to all. No
    folder gets its name before all are on their disks (`finish_publishing`).

    Raises:
        OSError: A disk is full or failing, on any rank.
        CheckpointError: A file was damaged on its way to another machine.
    """
    if storage.is_shared:
        with together():
            if storage.is_leader:
                _describe(partial, [_take_digests(partial)], source, storage)
                sync(partial)
                _rename(partial, folder)
        return
    with together():
        written = _take_digests(partial) if storage.is_leader else {}
    everywhere = storage.gather(written)
    with together():
        common = _describe(partial, everywhere, source, storage) if storage.rank == 0 else {}
    common = tell(common, 0)
    held = [set(common), *(set[str]() for _ in storage.leaders[1:])]
    exchange(partial, partial, common, held, storage)
    with together():
        if storage.is_leader:
            sync(partial)
    with together():
        if storage.is_leader:
            _rename(partial, folder)


def finish_publishing(run: Path, storage: Storage) -> None:
    """Names the checkpoints that a machine was to name when it was stopped; all ranks call it.

    One whose name another machine has given was on all their disks before.

    Raises:
        OSError: A folder can't be renamed, on any rank.
    """
    if storage.is_shared:
        return
    with together():
        named = _manifests(run, "iter_*") if storage.is_leader else {}
    published = set().union(*storage.gather(set(named.values())))
    with together():
        ours = _manifests(run, ".iter_*.partial-*") if storage.is_leader else {}
        for partial, digest in ours.items():
            if digest in published:
                _rename(partial, run / _final_name(partial))


def _manifests(run: Path, pattern: str) -> dict[Path, str]:
    """The digests of the manifests in the folders of these names."""
    paths = (folder / MANIFEST for folder in run.glob(pattern))
    return {path.parent: file_digest(path) for path in paths if path.is_file()}


def _final_name(partial: Path) -> str:
    """Of `.iter_0000030.partial-0a1b2c3d`, iter_0000030."""
    return partial.name.split(".")[1]


def _take_digests(partial: Path) -> dict[str, FileEntry]:
    """What the ranks of this storage wrote; their notes are removed."""
    entries: dict[str, FileEntry] = {}
    for path in sorted(partial.glob(_DIGESTS.format("*"))):
        found = json.loads(path.read_text("utf-8"))
        entries |= {name: FileEntry(*entry) for name, entry in found.items()}
        path.unlink()
    return entries


def _describe(
    partial: Path,
    written: Sequence[Mapping[str, FileEntry]],
    source: dict[str, Any],
    storage: Storage,
) -> dict[str, FileEntry]:
    """Writes the manifest; gives the files that are no rank's own, which every folder needs.

    Args:
        partial: The folder of rank 0.
        written: What the ranks of each storage wrote.
        source: For the manifest.
        storage: The storage of rank 0.
    """
    files = {name: entry for entries in written for name, entry in entries.items()}
    others = [path for path in partial.iterdir() if path.name not in files]
    common = {path.name: _entry(path) for path in others}
    places: dict[str, list[str]] = {}
    if not storage.is_shared:
        folders = [f"{place}/{_final_name(partial)}" for place in storage.places]
        places = dict(zip(folders, map(sorted, written), strict=True))
    Manifest(
        source=source,
        settings={},
        versions=manifest_versions(),
        verified=False,
        non_finite=0,
        files=dict(sorted((files | common).items())),
        tensors={},
        places=places,
    ).write(partial)
    return common | {MANIFEST: _entry(partial / MANIFEST)}


def _rename(partial: Path, folder: Path) -> None:
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


def damage(folder: Path, files: Mapping[str, FileEntry], storage: Storage) -> str | None:
    """What of a checkpoint isn't as it was written, or None; all ranks call it.

    The ranks of a storage read what it has of the `files`, each a part.
    """
    ours = [name for name in sorted(files) if (folder / name).exists()]
    share = ours[storage.members.index(storage.rank) :: len(storage.members)]
    problem = next((p for name in share if (p := _difference(folder / name, files[name]))), None)
    if problem and not storage.is_shared:
        problem = f"on {storage.places[storage.index]}, {problem}"
    return first(problem)


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


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, file_digest(path))
