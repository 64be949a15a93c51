"""A checkpoint whose files are spread over the disks of several machines.

Each machine has what its own ranks wrote; before a run goes on, every machine gets the rest. That
takes the time and the room of a whole checkpoint on each machine, but any layout can go on from it,
and a machine that is replaced loses nothing that another one has.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glm3cli.checkpoint.files.digests import file_digest
from glm3cli.checkpoint.files.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from glm3cli.checkpoint.run.exchange import exchange
from glm3cli.errors import CheckpointError
from glm3cli.host.files import sync, sync_one
from glm3cli.parallel.storage import Storage, first, tell, together

_SHOWN = 3


@dataclass(frozen=True)
class Holdings:
    """What the storages have of a checkpoint.

    Attributes:
        files: What its manifest lists, and the manifest; nothing of another program's checkpoint.
        held: The names of the files that each storage has.
        problem: Why it can't be put together, or None.
    """

    files: Mapping[str, FileEntry]
    held: Sequence[set[str]]
    problem: str | None

    def lacking(self, index: int) -> dict[str, FileEntry]:
        """The files that a storage has not."""
        return {name: entry for name, entry in self.files.items() if name not in self.held[index]}


def find_holdings(folder: Path, storage: Storage) -> Holdings:
    """Looks which files of a checkpoint are where; all ranks call it.

    A checkpoint without a manifest, of another program, is taken as it is.
    """
    trouble, entry, names = None, None, set[str]()
    try:
        entry = _entry_of_manifest(folder)
        names |= {path.name for path in folder.iterdir()} if folder.is_dir() else set()
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
    return Holdings(files, held, _told(missing, manifest) if missing else None)


def _entry_of_manifest(folder: Path) -> FileEntry | None:
    path = folder / MANIFEST
    return FileEntry(path.stat().st_size, file_digest(path)) if path.is_file() else None


def _read(folder: Path, storage: Storage, reader: int) -> Manifest | str:
    """The manifest, or what is wrong with it; one rank reads it for all that may not have it."""
    answer: Manifest | str = ""
    try:
        if storage.is_shared or storage.rank == reader:
            answer = read_manifest(folder)
    except CheckpointError as error:
        answer = error.message
    return answer if storage.is_shared else tell(answer, reader)


def _told(missing: Sequence[str], manifest: Manifest) -> str:
    shown = ", ".join(missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    way = manifest.way_to(missing)
    return f"nobody has its {shown}{more}" + (f" ({way})" if way else "")


def bring_together(folder: Path, parts: Holdings, storage: Storage) -> tuple[int, int]:
    """Gives every storage the files that it lacks; all ranks call it.

    A file gets its name when it is complete, has the right digest, and is on the disk.

    Returns:
        How many files went over the network, and their bytes.

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
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"{folder}: the files of other machines take {num_bytes / 2**30:.1f} GiB, but "
            f"{free / 2**30:.1f} GiB are free",
            "free some space; every machine needs all of a checkpoint to go on from it",
        )


def _move(aside: Path, folder: Path) -> None:
    if folder.exists():
        for path in aside.iterdir():
            path.replace(folder / path.name)
        aside.rmdir()
        sync_one(folder)
    else:
        aside.rename(folder)
    sync_one(folder.parent)
