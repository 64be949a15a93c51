"""Writes files as a whole or not at all, and waits until files and folders are on the disk."""

import json
import os
from pathlib import Path
from typing import Any

from glm3cli.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file beside `path`, sends it to the disk, and gives it the name `path`.

    Raises:
        OSError: The disk is full or failing; `path` is unchanged.
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Writes `values` as JSON, indented by one space, as `write_text` does.

    Raises:
        OSError: The disk is full or failing; `path` is unchanged.
        TypeError: Something in `values` has no form in JSON; `path` is unchanged.
    """
    write_text(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def existing_parent(path: Path) -> Path:
    """Returns `path` itself if it exists, else the nearest folder above it that does.

    Raises:
        ConfigError: A link on the way leads to what doesn't exist.
    """
    absolute = path.absolute()
    found = next(place for place in (absolute, *absolute.parents) if os.path.lexists(place))
    if not found.exists():
        raise ConfigError(
            f"{path}: {found} is a link to {found.readlink()}, which does not exist",
            "make what it leads to, or remove the link",
        )
    return found


def sync(folder: Path) -> None:
    """Waits until a folder, and all files and folders in it, are on the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_one(path)
    sync_one(folder)


def sync_one(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
