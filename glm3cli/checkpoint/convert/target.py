"""Checks the folder that a conversion is asked to write, before anything is written.

Needs no torch, so that a mistake in a path is reported within a second.
"""

from pathlib import Path
from typing import Literal

from glm3cli.checkpoint.locate import ADAPTER_CONFIG, locate
from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.host.files import existing_parent

TargetKind = Literal["model", "adapter"]


def check_target(target: Path, source: Path, *, force: bool, kind: TargetKind = "model") -> None:
    """Checks that a model or an adapter may be written to `target`; changes nothing on the disk.

    Args:
        target: The folder to write.
        source: The folder that is read.
        force: Whether an existing `target` of the same kind may be replaced.
        kind: What is going to be written.

    Raises:
        ConfigError: The target exists, overlaps the source, or holds something of another kind.
    """
    new, old = target.resolve(), source.resolve()
    if new == old or new.is_relative_to(old) or old.is_relative_to(new):
        raise ConfigError(
            f"{target} and the source {source} lie in one another", "give a folder elsewhere"
        )
    if target.is_symlink() or target.exists():
        if not force:
            raise ConfigError(f"{target} exists", "choose another folder, or replace it by --force")
        _check_replaceable(target, kind)
    elif not existing_parent(new.parent).is_dir():
        raise ConfigError(f"{existing_parent(new.parent)} is a file", "give a folder elsewhere")


def _check_replaceable(target: Path, kind: TargetKind) -> None:
    """Checks that an existing folder holds nothing but what --force may replace.

    --force removes the folder, so a mistyped path must not cost anyone's other files.
    """
    advice = "remove it yourself, or choose another folder"
    if target.is_symlink() or not target.is_dir():
        raise ConfigError(f"{target} is no folder, so --force doesn't replace it", advice)
    if any(target.iterdir()) and _kind_of(target) != kind:
        raise ConfigError(
            f"{target} holds something other than a model"
            + (" adapter" if kind == "adapter" else "")
            + ", so --force doesn't replace it",
            advice,
        )


def _kind_of(folder: Path) -> TargetKind | None:
    """Returns what a folder holds, judged by its file names; None if it is neither kind."""
    try:
        locate(folder)
    except CheckpointError:
        return "adapter" if (folder / ADAPTER_CONFIG).is_file() else None
    return "model"
