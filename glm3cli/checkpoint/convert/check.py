"""Checks a converted folder against its manifest."""

from dataclasses import dataclass
from pathlib import Path

from glm3cli.checkpoint.convert.progress import Progress
from glm3cli.checkpoint.convert.tensor_digests import all_digests, slot_name
from glm3cli.checkpoint.files.digests import FileDigests
from glm3cli.checkpoint.files.manifest import MANIFEST, Manifest, find_manifest, read_manifest
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.checkpoint.locate import locate
from glm3cli.checkpoint.source import StoredSource
from glm3cli.errors import CheckpointError, ConfigError

_SHOWN = 5


@dataclass(frozen=True)
class Check:
    """What was found to be as the manifest says."""

    folder: str
    files: int
    tensors: int


def check(path: Path) -> Check:
    """Reads all files and tensors of a MODEL and compares them with its manifest.

    Raises:
        CheckpointError: It has none, or files or tensors differ from it; they are named.
    """
    found: tuple[Path, Manifest] | None
    if (path / MANIFEST).is_file():  # no matter whether anything else here can be read
        found = path, read_manifest(path)
    else:
        found = find_manifest(path, locate(path).folder)
    if found is None:
        raise CheckpointError(
            f"{path} has no {MANIFEST} to check it against",
            "only folders that glm3 convert wrote have one",
        )
    folder, manifest = found
    problems = [
        f"{name} is missing"
        if not (folder / name).is_file()
        else f"{name} has {(folder / name).stat().st_size} bytes instead of {entry.bytes}"
        for name, entry in manifest.files.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry.bytes
    ]
    problems = problems or _compare(folder, manifest)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"{folder} is not as it was written: {'; '.join(problems[:_SHOWN])}{more}",
            manifest.way_to(name for name in manifest.files if not (folder / name).exists())
            or "copy or convert it again; the disk may be failing",
        )
    return Check(str(folder), len(manifest.files), len(manifest.tensors))


def _compare(folder: Path, manifest: Manifest) -> list[str]:
    """What differs in a folder whose files are there and have the right sizes."""
    tensors: dict[str, str] = {}
    problems: list[str] = []
    files = FileDigests()
    try:
        tensors = _digests(open_source(folder), files)
    except (CheckpointError, ConfigError) as error:  # the files' digests will say where
        problems.append(error.message)
    named = {name: entry for name, entry in manifest.files.items() if entry.sha256 is not None}
    hashed = files.finish(folder / name for name in named)
    problems += [f"{n} differs" for n, e in named.items() if hashed[folder / n] != e.sha256]
    problems += [
        f"tensor {name} differs"
        for name, expected in manifest.tensors.items()
        if tensors.get(name, expected) != expected
    ]
    return problems


def _digests(source: StoredSource, files: FileDigests) -> dict[str, str]:
    total = sum(path.stat().st_size for path in source.files())
    found = {}
    with Progress(total, "checking") as progress:
        for slot, value, num_bytes in all_digests(source, files):
            found[slot_name(slot)] = value
            progress.advance(num_bytes)
    return found
