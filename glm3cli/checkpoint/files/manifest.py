"""Writes and reads glm3-manifest.json, which says where a folder of weights comes from.

It also holds the digests of the files and of the tensors, so that the folder can be checked later.
Needs no torch.
"""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glm3cli.errors import CheckpointError
from glm3cli.host.parsing import read_json
from glm3cli.host.versions import versions

MANIFEST = "glm3-manifest.json"
_FORMAT = 2  # 1 had the SHA-256 of the tensors
_PACKAGES = ("torch", "safetensors", "megatron-core")


@dataclass(frozen=True)
class FileEntry:
    """What a manifest says about one file.

    Attributes:
        bytes: The size of the file, in bytes.
        sha256: The digest of what was read back from the disk, in hexadecimal digits; None after
            --no-verify.
    """

    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """What is known of a folder that a conversion or a training run wrote.

    Attributes:
        source: The path, layout and iteration of the model that was converted, or the training run.
        settings: The layout, parallel sizes, type and adapter of the conversion; for a training
            run, what it is made of (train/origin.py).
        versions: The versions of glm3, Python and the packages that wrote the folder, by name.
        verified: Whether the tensors were read back and compared.
        non_finite: The number of values that are NaN or infinite.
        files: The size and digest of every file of the folder except the manifest, by its path
            in the folder.
        tensors: The XXH3 (128 bits) of every whole tensor in the type it is stored in, by its name
            in the chatglm layout; empty for a training run.
        places: The files that the ranks of each machine wrote, by HOST:FOLDER, if the machines of
            the training run have disks of their own; all other files are on every disk.
    """

    source: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    verified: bool
    non_finite: int
    files: dict[str, FileEntry]
    tensors: dict[str, str]
    places: dict[str, list[str]] = field(default_factory=dict)

    def way_to(self, names: Iterable[str]) -> str | None:
        """Returns advice on how to get missing files from the machines that wrote them.

        Args:
            names: The missing files.

        Returns:
            The advice; None if none of the files is known to be on a certain machine.
        """
        wanted = set(names)
        places = [place for place, files in self.places.items() if not wanted.isdisjoint(files)]
        return f"copy the files of {' and '.join(places)} into this folder" if places else None

    def write(self, folder: Path) -> None:
        """Writes the manifest into the folder that it describes."""
        text = json.dumps({"format": _FORMAT} | asdict(self), indent=1, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def manifest_versions() -> dict[str, str]:
    """Returns the versions of the program, Python and packages that a manifest names."""
    return versions(*_PACKAGES) | {"python": platform.python_version()}


def find_manifest(path: Path, weights: Path) -> tuple[Path, Manifest] | None:
    """Finds the manifest that lists the files of a model's weights.

    Args:
        path: The model, as the user gave it.
        weights: The folder of its weights, which may lie within the folder of the manifest.

    Returns:
        The folder of the manifest, and the manifest; None if there is none.

    Raises:
        CheckpointError: The manifest is damaged.
    """
    for folder in dict.fromkeys((path, weights, weights.parent)):
        if not (folder / MANIFEST).is_file():
            continue
        manifest = read_manifest(folder)
        inside = weights.resolve().relative_to(folder.resolve()).as_posix()
        prefix = "" if inside == "." else inside + "/"
        if any(name.startswith(prefix) for name in manifest.files):
            return folder, manifest
    return None


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest in a folder.

    Raises:
        CheckpointError: The manifest is missing, damaged, or of another format.
    """
    path = folder / MANIFEST
    try:
        values = read_json(path)
        number = values.pop("format")
        files = {name: FileEntry(**entry) for name, entry in values.pop("files").items()}
        manifest = Manifest(files=files, **values)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}", "convert the model again, or remove the file"
        ) from None
    if number != _FORMAT:
        raise CheckpointError(
            f"{path} has the format {number}, but this glm3 knows {_FORMAT}",
            "convert the model again, or remove the file",
        )
    return manifest
