"""glm3-manifest.json: where converted weights come from, and what they and their files were.

Free of torch.
"""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glm3cli.errors import CheckpointError
from glm3cli.host.versions import versions

MANIFEST = "glm3-manifest.json"
_FORMAT = 2  # 1 had the SHA-256 of the tensors
_PACKAGES = ("torch", "safetensors", "megatron-core")


@dataclass(frozen=True)
class FileEntry:
    """One file of a converted folder.

    Attributes:
        sha256: Of what was read back from the disk; None after --no-verify.
    """

    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """What is known of a converted folder.

    Attributes:
        source: Path, layout and iteration of the model that was converted.
        settings: Layout, cuts, type and adapter.
        versions: Of the packages that made the folder.
        verified: Whether the tensors were read back and compared.
        non_finite: Number of values that are NaN or infinite.
        files: All files of the folder by their paths in it, but for the manifest.
        tensors: The XXH3 (128 bits) of every whole tensor by its ChatGLM name, in the type it is
            stored in.
        places: The files that the ranks of each machine wrote, by HOST:FOLDER, where a training's
            machines have disks of their own; all other files are on each of them.
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
        """How to get files that other machines of the training wrote; None if none did."""
        wanted = set(names)
        places = [place for place, files in self.places.items() if not wanted.isdisjoint(files)]
        return f"copy the files of {' and '.join(places)} into this folder" if places else None

    def write(self, folder: Path) -> None:
        """Writes it into the folder that it describes."""
        text = json.dumps({"format": _FORMAT} | asdict(self), indent=1, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def manifest_versions() -> dict[str, str]:
    """The versions that a manifest names."""
    return versions(*_PACKAGES) | {"python": platform.python_version()}


def find_manifest(path: Path, weights: Path) -> tuple[Path, Manifest] | None:
    """The folder and the manifest that a MODEL's weights belong to, if they have one.

    Args:
        path: The MODEL.
        weights: The folder of its weights, which may lie within the folder of the manifest.

    Raises:
        CheckpointError: There is one, but it is damaged.
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
    """The manifest in a folder.

    Raises:
        CheckpointError: It is damaged, or of a newer format.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
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
