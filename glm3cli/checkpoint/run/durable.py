"""Saves the checkpoints of a training run so that each is complete or absent, and damage is found.

Every rank writes its files into a folder with a temporary name, and leaves their digests there.
From these the manifest is made. The folder gets its final name, RUN/iter_0000030, when all of its
content is on the disk.

The machines of a run may share one disk or have a disk each. A `Storage` (see `parallel/storage`)
says which ranks see the same folder; its lowest rank, the leader, does what is done once per disk.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from glm3cli.checkpoint.files.digests import file_digest
from glm3cli.checkpoint.files.manifest import MANIFEST, FileEntry, Manifest, manifest_versions
from glm3cli.checkpoint.layouts.dist import shortage
from glm3cli.checkpoint.locate import iteration_of, kind_of
from glm3cli.checkpoint.run.exchange import exchange
from glm3cli.errors import CheckpointError
from glm3cli.host.files import sync, sync_one
from glm3cli.parallel.storage import Storage, first, tell, together

_DIGESTS = ".digests-{}.json"


def write_and_digest(write: Callable[..., None], folder: Path, rank: int, *args: Any) -> None:
    """Writes this rank's files by megatron-core's function, and a note with their digests.

    Args:
        write: megatron-core's function, which writes files named __RANK_*.distcp.
        folder: The folder of the checkpoint, which still has its temporary name.
        rank: This rank.
        args: The arguments of `write`.

    Raises:
        OSError: The disk is full or failing.
    """
    write(*args)
    names = [path.name for path in folder.glob(f"__{rank}_*.distcp")]
    entries = {name: astuple(_entry(folder / name)) for name in names}
    (folder / _DIGESTS.format(rank)).write_text(json.dumps(entries), "utf-8")


def publish(
    partial: Path,
    folder: Path,
    source: dict[str, Any],
    storage: Storage,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Adds the manifest, sends everything to the disk, and gives the folder its final name.

    All ranks must call it. Where machines have disks of their own, each disk keeps what its ranks
    wrote; the manifest, which is the same everywhere, lists the files of all. Files that belong to
    no rank, such as metadata.json, are sent from rank 0 to every disk. No folder gets its final
    name before all are on their disks (see `finish_publishing`).

    Args:
        partial: The folder under its temporary name, to which all ranks have written.
        folder: The final name.
        source: What the manifest says about the origin of the weights.
        storage: The storage of this rank.
        settings: What the manifest says about the training; rank 0's are written.

    Raises:
        OSError: A disk is full or failing, on any rank.
        CheckpointError: A file was damaged on its way to another machine.
    """
    notes = {"source": source, "settings": dict(settings or {})}
    if storage.is_shared:
        with together():
            if storage.is_leader:
                _describe(partial, [_take_digests(partial)], notes, storage)
                sync(partial)
                _rename(partial, folder)
        return
    with together():
        written = _take_digests(partial) if storage.is_leader else {}
    everywhere = storage.gather(written)
    with together():
        common = _describe(partial, everywhere, notes, storage) if storage.rank == 0 else {}
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
    """Gives checkpoints their final name on machines that were stopped just before they could.

    All ranks must call it. Such a checkpoint was complete on all disks if another machine has given
    it the final name.

    Args:
        run: The folder of the training run.
        storage: The storage of this rank.

    Raises:
        OSError: A folder can't be renamed, on any rank.
    """
    if storage.is_shared:
        return
    with together():
        folders = [path for path in run.glob("*") if iteration_of(path) is not None]
        named = _manifests(folders) if storage.is_leader else {}
    published = set().union(*storage.gather(set(named.values())))
    with together():
        ours = _manifests(run.glob(".*.partial-*")) if storage.is_leader else {}
        for partial, digest in ours.items():
            if digest in published:
                _rename(partial, run / _final_name(partial))


def _manifests(folders: Iterable[Path]) -> dict[Path, str]:
    """Returns the SHA-256 of the manifest in each of the folders that has one."""
    paths = (folder / MANIFEST for folder in folders)
    return {path.parent: file_digest(path) for path in paths if path.is_file()}


def _final_name(partial: Path) -> str:
    """Returns the final name of a temporary folder such as .iter_0000030.partial-0a1b2c3d."""
    return partial.name.split(".")[1]


def _take_digests(partial: Path) -> dict[str, FileEntry]:
    """Reads and removes the notes in which the ranks of this storage list the files they wrote."""
    entries: dict[str, FileEntry] = {}
    for path in sorted(partial.glob(_DIGESTS.format("*"))):
        found = json.loads(path.read_text("utf-8"))
        entries |= {name: FileEntry(*entry) for name, entry in found.items()}
        path.unlink()
    return entries


def _describe(
    partial: Path,
    written: Sequence[Mapping[str, FileEntry]],
    notes: dict[str, Any],
    storage: Storage,
) -> dict[str, FileEntry]:
    """Writes the manifest of a checkpoint; rank 0 calls it.

    Args:
        partial: The folder of the checkpoint on rank 0's storage.
        written: The files that the ranks of each storage wrote.
        notes: What the manifest says about the origin of the weights and about the training.
        storage: The storage of rank 0.

    Returns:
        The manifest and the files that belong to no rank, which every storage needs.
    """
    files = {name: entry for entries in written for name, entry in entries.items()}
    present = {path.relative_to(partial).as_posix(): path for path in files_in(partial)}
    common = {name: _entry(path) for name, path in present.items() if name not in files}
    places: dict[str, list[str]] = {}
    if not storage.is_shared:
        folders = [f"{place}/{_final_name(partial)}" for place in storage.places]
        places = dict(zip(folders, map(sorted, written), strict=True))
    Manifest(
        **notes,
        versions=manifest_versions(),
        verified=False,
        non_finite=0,
        files=dict(sorted((files | common).items())),
        tensors={},
        places=places,
    ).write(partial)
    return common | {MANIFEST: _entry(partial / MANIFEST)}


def files_in(folder: Path) -> list[Path]:
    """Returns all files in a folder and in those below it."""
    return [path for path in folder.rglob("*") if path.is_file()]


def _rename(partial: Path, folder: Path) -> None:
    """Gives a folder its final name, and replaces a checkpoint that has it already."""
    if folder.exists():  # of a run that has gone on from an earlier checkpoint
        remove(folder)
    partial.rename(folder)
    sync_one(folder.parent)


def remove(folder: Path) -> None:
    """Removes a checkpoint.

    It is renamed first: a folder that has the name of a checkpoint is complete at every moment.
    """
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def damage(folder: Path, files: Mapping[str, FileEntry], storage: Storage) -> str | None:
    """Looks for a file of a checkpoint that isn't as it was written; all ranks must call it.

    The ranks of a storage share the reading of the files that it has.

    Args:
        folder: The checkpoint.
        files: The files that its manifest lists.
        storage: The storage of this rank.

    Returns:
        A sentence about the first damage that was found, the same on all ranks; None if all files
        are sound.
    """
    if not files:
        return first(_damage_without_manifest(folder))
    ours = [name for name in sorted(files) if (folder / name).exists()]
    share = ours[storage.members.index(storage.rank) :: len(storage.members)]
    problem = next((p for name in share if (p := _difference(folder / name, files[name]))), None)
    if problem and not storage.is_shared:
        problem = f"on {storage.places[storage.index]}, {problem}"
    return first(problem)


def _damage_without_manifest(folder: Path) -> str | None:
    """Returns a sentence about what a checkpoint lacks of what it says itself, or None.

    Copying it may have been cut off before the manifest, or it comes from another program.
    """
    try:
        return shortage(folder) if kind_of(folder) == "dist" else None
    except CheckpointError as error:
        return error.message
    except OSError as error:
        return f"{error.filename}: {error.strerror}"


def _difference(path: Path, entry: FileEntry) -> str | None:
    """Returns how a file differs from its entry in the manifest; None if it doesn't."""
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
    """Returns the entry of a file in a manifest."""
    return FileEntry(path.stat().st_size, file_digest(path))
