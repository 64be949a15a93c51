"""Brings together a checkpoint whose files are spread over the disks of several machines.

Each machine has what its own ranks wrote; before a run goes on, every machine gets the rest. That
takes the time and the space of a whole checkpoint on each machine, but a run can go on from it at
any parallel sizes, and a machine that is replaced loses nothing that another one has.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glm3cli.checkpoint.files.digests import file_digest
from glm3cli.checkpoint.files.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from glm3cli.checkpoint.run.durable import files_in
from glm3cli.checkpoint.run.exchange import exchange
from glm3cli.errors import CheckpointError
from glm3cli.host.files import sync, sync_one
from glm3cli.parallel.storage import Storage, first, tell, together

_SHOWN = 3


@dataclass(frozen=True)
class Holdings:
    """Which storages have which files of a checkpoint.

    Attributes:
        files: The files that the checkpoint's manifest lists, and the manifest, by their names;
            empty for a checkpoint of another program, which has no manifest.
        held: The names of the files that each storage has.
        problem: A sentence about why the checkpoint can't be put together; None if it can.
    """

    files: Mapping[str, FileEntry]
    held: Sequence[set[str]]
    problem: str | None

    def lacking(self, index: int) -> dict[str, FileEntry]:
        """Returns the files that the storage with this index hasn't."""
        return {name: entry for name, entry in self.files.items() if name not in self.held[index]}


def find_holdings(folder: Path, storage: Storage) -> Holdings:
    """Finds out which storage has which files of a checkpoint; all ranks must call it.

    A checkpoint without a manifest comes from another program and isn't checked.

    Args:
        folder: The checkpoint.
        storage: The storage of this rank.
    """
    trouble, entry, names = None, None, set[str]()
    try:
        entry = _entry_of_manifest(folder)
        names |= {path.relative_to(folder).as_posix() for path in files_in(folder)}
    except OSError as error:
        trouble = f"{error.filename}: {error.strerror}"
    found = storage.gather((entry, names))
    held = [names for _, names in found]
    entries = {place: entry for place, (entry, _) in zip(storage.places, found, strict=True)}
    if trouble := first(trouble):
        return Holdings({}, held, trouble)
    known = [place for place, entry in entries.items() if entry]
    if not known:
        lacking = [place for place, names in zip(entries, held, strict=True) if not names]
        problem = f"it has no {MANIFEST}, and {', '.join(lacking)} lacks it" if lacking else None
        return Holdings({}, held, problem)
    if len({entry for entry in entries.values() if entry}) > 1:
        return Holdings({}, held, f"it is of different saves on {' and '.join(known)}")
    manifest = _read(folder, storage, storage.leaders[storage.places.index(known[0])])
    if isinstance(manifest, str):
        return Holdings({}, held, manifest)
    missing = sorted(set(manifest.files).difference(*held))
    files = manifest.files | {MANIFEST: next(filter(None, entries.values()))}
    return Holdings(files, held, _complaint(missing, manifest) if missing else None)


def _entry_of_manifest(folder: Path) -> FileEntry | None:
    """Returns the size and digest of the manifest in a folder; None if it has none."""
    path = folder / MANIFEST
    return FileEntry(path.stat().st_size, file_digest(path)) if path.is_file() else None


def _read(folder: Path, storage: Storage, reader: int) -> Manifest | str:
    """Returns the manifest, or a sentence about what is wrong with it; all ranks must call it.

    Args:
        folder: The checkpoint.
        storage: The storage of this rank.
        reader: A rank that has the manifest. Unless all ranks share a folder, it reads for all.
    """
    answer: Manifest | str = ""
    try:
        if storage.is_shared or storage.rank == reader:
            answer = read_manifest(folder)
    except CheckpointError as error:
        answer = error.message
    return answer if storage.is_shared else tell(answer, reader)


def _complaint(missing: Sequence[str], manifest: Manifest) -> str:
    """Returns a sentence about the files that no storage has, and how to get them."""
    shown = ", ".join(missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    way = manifest.way_to(missing)
    return f"nobody has its {shown}{more}" + (f" ({way})" if way else "")


def bring_together(folder: Path, parts: Holdings, storage: Storage) -> tuple[int, int]:
    """Gives every storage the files that it lacks; all ranks must call it.

    A file gets its name when it is complete, has the right digest, and is on the disk.

    Args:
        folder: The checkpoint.
        parts: Which storage has which of its files.
        storage: The storage of this rank.

    Returns:
        The number of files that went over the network, and their size in bytes.

    Raises:
        OSError: A disk is full or failing, on any rank.
        CheckpointError: The files don't fit on a disk, or were damaged on their way.
    """
    moved = {
        name: entry
        for name, entry in parts.files.items()
        if any(name not in names for names in parts.held)
    }
    if not moved:
        return 0, 0
    lacking = parts.lacking(storage.index) if storage.is_leader else {}
    aside = folder.with_name(f".{folder.name}.fetched")
    with together():
        if lacking:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was stopped meanwhile
            _check_room(folder, sum(entry.bytes for entry in lacking.values()))
            aside.mkdir(parents=True)
    exchange(folder, aside, moved, parts.held, storage)
    with together():
        if lacking:
            sync(aside)
            _move(aside, folder)
    return len(moved), sum(entry.bytes for entry in moved.values())


def _check_room(folder: Path, num_bytes: int) -> None:
    """Checks that the disk of a checkpoint has room for `num_bytes` bytes of further files."""
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"{folder}: the files of other machines take {num_bytes / 2**30:.1f} GiB, but "
            f"{free / 2**30:.1f} GiB are free",
            "free some space; every machine needs all of a checkpoint to go on from it",
        )


def _move(aside: Path, folder: Path) -> None:
    """Moves the files in `aside` into the checkpoint, which may not exist on this disk yet."""
    if folder.exists():
        for path in files_in(aside):
            target = folder / path.relative_to(aside)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
        shutil.rmtree(aside)
        sync(folder)
    else:
        aside.rename(folder)
    sync_one(folder.parent)
