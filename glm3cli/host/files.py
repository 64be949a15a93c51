"""Files that are complete or as they were, and folders whose content is safely on the disk."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file beside `path`, sends it to the disk, and gives it the name `path`.

    Raises:
        OSError: The disk is full or failing; `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Writes `values` as JSON, indented by one space, by the way of `write_text`.

    Raises:
        OSError: The disk is full or failing; `path` is as it was.
        TypeError: Something in `values` has no form in JSON; `path` is as it was.
    """
    write_text(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def existing_parent(path: Path) -> Path:
    """The nearest of `path` and the folders around it that exists."""
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())


def sync(folder: Path) -> None:
    """Waits until everything below `folder` is on the disk."""
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
