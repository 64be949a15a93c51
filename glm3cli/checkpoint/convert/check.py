"""Checks a folder against the manifest that was written with it."""

from dataclasses import dataclass
from pathlib import Path

from glm3cli.checkpoint.convert.report import Report, report_nothing
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
    """What was compared with a manifest, and found to be as it says.

    Attributes:
        folder: The folder of the manifest.
        files: The number of files.
        tensors: The number of whole tensors.
    """

    folder: str
    files: int
    tensors: int


def check(path: Path, report: Report = report_nothing) -> Check:
    """Reads all files and tensors of a model and compares them with its manifest.

    Args:
        path: A model that a conversion or a training run wrote, in any layout.
        report: Called with the progress, as "checking".

    Raises:
        CheckpointError: There is no manifest, or files or tensors differ from it; the message names
            them.
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
    problems = problems or _compare(folder, manifest, report)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"{folder} is not as it was written: {'; '.join(problems[:_SHOWN])}{more}",
            manifest.way_to(name for name in manifest.files if not (folder / name).exists())
            or "copy or convert it again; the disk may be failing",
        )
    return Check(str(folder), len(manifest.files), len(manifest.tensors))


def _compare(folder: Path, manifest: Manifest, report: Report) -> list[str]:
    """Compares the digests of all files and tensors with the manifest.

    Args:
        folder: A folder whose files are all there and have the right sizes.
        manifest: Its manifest.
        report: Called with the progress.

    Returns:
        A phrase about each file and each tensor that differs.
    """
    tensors: dict[str, str] = {}
    problems: list[str] = []
    files = FileDigests()
    try:
        tensors = _digests(open_source(folder), files, report)
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


def _digests(source: StoredSource, files: FileDigests, report: Report) -> dict[str, str]:
    """Returns the digest of every tensor by its name in the manifest, and hashes the files, too."""
    done, total = 0, sum(path.stat().st_size for path in source.files())
    found = {}
    report("checking", done, total)
    for slot, value, num_bytes in all_digests(source, files):
        found[slot_name(slot)] = value
        done += num_bytes
        report("checking", done, total)
    return found
