"""Puts a new folder in place at once: nothing half-written is ever seen under its final name."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glm3cli.checkpoint.locate import locate
from glm3cli.errors import CheckpointError, ConfigError


def check_target(target: Path, source: Path, *, force: bool) -> None:
    """Checks that `target` may be written; free of side effects.

    Raises:
        ConfigError: It exists, overlaps the source, or holds something other than a model.
    """
    new, old = target.resolve(), source.resolve()
    if new == old or new.is_relative_to(old) or old.is_relative_to(new):
        raise ConfigError(
            f"{target} and the source {source} lie in one another", "give a folder elsewhere"
        )
    if target.is_symlink() or target.exists():
        if not force:
            raise ConfigError(f"{target} exists", "choose another folder, or replace it by --force")
        _check_replaceable(target)
    elif not _existing_parent(new).is_dir():
        raise ConfigError(f"{_existing_parent(new)} is a file", "give a folder elsewhere")


def _check_replaceable(target: Path) -> None:
    """--force removes what it replaces, so a mistyped path must not cost anyone's other files."""
    advice = "remove it yourself, or choose another folder"
    if target.is_symlink() or not target.is_dir():
        raise ConfigError(f"{target} is no folder, so --force doesn't replace it", advice)
    try:
        if any(target.iterdir()):
            locate(target)
    except CheckpointError:
        raise ConfigError(
            f"{target} holds something other than a model, so --force doesn't replace it", advice
        ) from None


def check_space(target: Path, num_bytes: int) -> None:
    """Checks that the disk of `target` has room for `num_bytes`.

    Raises:
        ConfigError: It hasn't.
    """
    free = shutil.disk_usage(_existing_parent(target.resolve())).free
    if free < num_bytes:
        raise ConfigError(
            f"{target} needs {num_bytes / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free",
            "free some space, or choose a folder on another disk",
        )


@contextmanager
def staged(target: Path, *, force: bool) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends without an error.

    Args:
        target: The final name.
        force: Whether what is there may be replaced.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync(partial)
        _publish(partial, target, force=force)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _publish(partial: Path, target: Path, *, force: bool) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if force and target.exists():
        target.rename(old)
    elif target.exists():
        raise ConfigError(f"{target} has appeared meanwhile", "choose another folder")
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _sync_one(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(folder: Path) -> None:
    """Waits until everything below `folder` is on the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())
