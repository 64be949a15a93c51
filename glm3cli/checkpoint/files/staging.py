"""Puts a new folder in place at once: nothing half-written is ever seen under its final name."""

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
    """A new folder beside `target` that takes its name when the block ends without an error.

    Whatever ends the process, `target` is what it was or the complete new folder. A signal that
    Python turns into an exception leaves nothing behind; what SIGKILL leaves, the next run with
    the same target removes (`remove_stale`).

    Args:
        target: The final name.
        force: Whether what is there may be replaced.

    Raises:
        CheckpointError: The disk is full or failing.
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
    """What the operating system said, if that is what went wrong."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    # torch.save's C++ writer (caffe2/serialize/inline_container.cc) doesn't say why.
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        return "the disk is full or failing"
    return None


def remove_stale(target: Path) -> None:
    """Removes what runs with the same target left that were killed, and says so.

    A run with --force that was killed between its two renames has moved the old folder aside but
    not yet put the new one in place: the old one gets its name back.
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
    """The folders of this kind of processes that no longer live."""
    if not target.parent.is_dir():
        return []
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-(\d+)")
    found = [(path, name.fullmatch(path.name)) for path in sorted(target.parent.iterdir())]
    return [path for path, match in found if match and not _is_another(int(match.group(1)))]


def _is_another(process: int) -> bool:
    """Whether a process other than this one has the number."""
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
    """Sends files to the disk while they are being written; a context manager.

    Left alone, the kernel begins late, and most of the waiting comes at the end.
    """

    def __init__(self) -> None:
        self._sent: dict[Path, int] = {}
        self._pool = started_pool()

    def note(self, path: Path, end: int) -> None:
        """Notes that the bytes of a file before `end` have their final values."""
        if end - self._sent.get(path, 0) >= _FLUSHED_BYTES:
            self._sent[path] = end
            self._pool.submit(sync_one, path)  # an error comes again when all is synced

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
