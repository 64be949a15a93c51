"""Writes a new folder under a temporary name, and gives it its final name when it is complete."""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.host.files import sync, sync_one
from glm3cli.host.signals import signals_held, started_pool

_FLUSHED_BYTES = 2**27
_log = logging.getLogger(__name__)


@contextmanager
def staged(target: Path, *, force: bool) -> Iterator[Path]:
    """Gives a block a new folder beside `target`, which becomes `target` when the block ends.

    Whatever ends the process, `target` is what it was before or the complete new folder. If the
    block raises, the new folder is removed, also after a signal that Python turns into an
    exception. What SIGKILL leaves is removed by the next run with the same target (`remove_stale`).

    Args:
        target: The final name.
        force: Whether an existing `target` may be replaced.

    Raises:
        CheckpointError: The disk is full or failing.
        ConfigError: `target` has appeared meanwhile, and may not be replaced.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        sync(partial)
        with signals_held():  # between the two renames neither folder has the name
            _publish(partial, target, force=force)
    except BaseException as error:
        with signals_held():
            shutil.rmtree(partial, ignore_errors=True)
        reason = _disk_trouble(error)
        if reason:
            raise CheckpointError(
                f"{getattr(error, 'filename', None) or target}: {reason}; nothing was kept",
                "free some space, or choose a folder on another disk",
            ) from error
        raise


def _disk_trouble(error: BaseException) -> str | None:
    """Returns the reason in words if the disk has caused an error; None for other errors."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    # torch.save's C++ writer (caffe2/serialize/inline_container.cc) doesn't say why.
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        return "the disk is full or failing"
    return None


def remove_stale(target: Path) -> None:
    """Removes the temporary folders that killed runs with the same target have left.

    A run with --force that was killed between its two renames has moved the old folder aside but
    not yet put the new one in place: the old one gets its name back. Either is logged.
    """
    target = target.absolute()
    for aside in _leftovers(target, "old"):
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)
            _log.warning("put %s back, which a killed run had moved aside", target)
    for partial in _leftovers(target, "partial"):
        shutil.rmtree(partial, ignore_errors=True)
        _log.warning("removed %s, which a killed run had left", partial)


def _leftovers(target: Path, kind: str) -> list[Path]:
    """Returns the temporary folders of processes that no longer run.

    Args:
        target: The final name.
        kind: The word in the temporary name: "partial" for new folders, "old" for folders that
            were moved aside.
    """
    if not target.parent.is_dir():
        return []
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-(\d+)")
    found = [(path, name.fullmatch(path.name)) for path in sorted(target.parent.iterdir())]
    return [path for path, match in found if match and not _is_another(int(match.group(1)))]


def _is_another(process: int) -> bool:
    """Says whether a process other than this one runs and has this process id."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _publish(partial: Path, target: Path, *, force: bool) -> None:
    """Renames the complete folder to its final name; if that fails, the old one is kept."""
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
    sync_one(target.parent)
    shutil.rmtree(old, ignore_errors=True)


class Flusher:
    """Sends files to the disk while they are being written; use it as a context manager.

    Otherwise the kernel begins late, and most of the waiting comes at the end.
    """

    def __init__(self) -> None:
        self._sent: dict[Path, int] = {}
        self._pool = started_pool()

    def note(self, path: Path, end: int) -> None:
        """Sends a file to the disk when enough of it is new.

        Args:
            path: The file.
            end: The byte before which nothing is going to change.
        """
        if end - self._sent.get(path, 0) >= _FLUSHED_BYTES:
            self._sent[path] = end
            self._pool.submit(sync_one, path)  # an error comes again when all is synced

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
