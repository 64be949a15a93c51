"""Writes files as a whole or not at all, large ones fast, and waits until all is on the disk."""

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from glm3cli.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Linux takes memory for the page cache in pieces as large as the bytes of one call, up to 2 MiB. A
# virtual machine may have handed free pieces of that size back to its host, and to get them again
# takes several times as long as to copy the bytes. Smaller pieces are never handed back.
_MOST_BYTES = 2**20


class LargeFile:
    """A file that threads write side by side, each to places of its own; a context manager."""

    def __init__(self, path: Path) -> None:
        """Opens a file, which is made if there is none; what it holds stays.

        Raises:
            OSError: The file can't be opened.
        """
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def write(self, values: "ReadableBuffer", place: int) -> int:
        """Writes bytes from the byte `place` on, and returns the byte behind them.

        Raises:
            OSError: The disk is full or failing.
        """
        left = memoryview(values).cast("B")
        while left:
            count = os.pwrite(self._descriptor, left[:_MOST_BYTES], place)
            left, place = left[count:], place + count
        return place

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._descriptor)


def expanded(path: str) -> str:
    """Returns a path with the `~` or the `~user` at its start replaced by that home.

    A user who isn't known stays, and there is no such file: `Path.expanduser` ends in a traceback.
    It is a text, since a path would lose the . in front of ./a.
    """
    return os.path.expanduser(path)  # noqa: PTH111


def place_trouble(path: Path) -> str | None:
    """Returns why no file can be written at a path, as the end of a sentence; None if one can.

    A file that is there is replaced by a new one of its name, as a device would be, too.
    """
    folder = path.absolute().parent
    if not path.name or path.is_dir():
        return "is a folder; give the name of a file"
    if path.exists() and not path.is_file():
        return "is a device or a pipe; give the name of a file"
    if not folder.is_dir():
        return f"the folder {path.parent} does not exist"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"you may not write to the folder {path.parent}"
    return None


def write_text(path: Path, text: str) -> None:
    r"""Writes a UTF-8 file beside `path`, sends it to the disk, and gives it the name `path`.

    The bytes of file names that are no UTF-8 become escapes, such as \udcc4, which JSON reads.

    Raises:
        OSError: The disk is full or failing, or no file can be written there; `path` is unchanged.
        ValueError: The name has a null byte.
    """
    if trouble := place_trouble(path):
        raise OSError(errno.EINVAL, trouble, str(path))
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
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
