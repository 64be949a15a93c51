"""The files of a run of `preprocess`, from their first token until they have their names.

They grow in a hidden folder beside their target. Every few seconds a run notes how far all of them
are, once that is on the disk; what was written after the last note is cut off when a run that was
killed is started again. The finished files get their names one by one, the .idx after their .bin
and a hidden record of the run last: where it is, everything is. Folder and record are named after
the first of the files, for texts and conversations may have the same prefix.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from glm3cli.data.index_cache import indices_of
from glm3cli.data.indexed import IndexedWriter, Mark
from glm3cli.data.preprocess.counts import Counts
from glm3cli.data.preprocess.job import Job
from glm3cli.data.preprocess.workers import Encoded, RowProblem
from glm3cli.errors import DataError
from glm3cli.host.files import write_json

_SECONDS_BETWEEN_NOTES = 10.0
_ERRORS, _NOTE, _RECORD, _LOCK = "errors.jsonl", "note.json", "record.json", "lock"
_log = logging.getLogger(__name__)


@dataclass
class Place:
    """How much of the input is in the output: whole files, and chunks of the next one."""

    file: int = 0
    chunk: int = 0


@dataclass
class _Note:
    """All that is needed to go on, as JSON."""

    job: dict[str, Any]
    place: Place = field(default_factory=Place)
    counts: Counts = field(default_factory=Counts)
    marks: dict[str, Mark] = field(default_factory=dict)
    error_bytes: int = 0
    is_finished: bool = False

    @classmethod
    def read(cls, path: Path) -> "_Note | None":
        try:
            values = json.loads(path.read_text("utf-8"))
            values["place"] = Place(**values["place"])
            values["counts"] = Counts(**values["counts"])
            values["marks"] = {name: Mark(**mark) for name, mark in values["marks"].items()}
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))


class Output:
    """All files of a run; a context manager.

    Attributes:
        folder: Where they are until they have their names.
    """

    def __init__(
        self,
        prefix: Path,
        names: Mapping[str, str],
        growing: Mapping[str, str],
        job: Job,
        *,
        skips_bad: bool,
    ) -> None:
        """Opens nothing yet.

        Args:
            prefix: What all names begin with.
            names: By key, the names of the finished files, without their endings.
            growing: By key, the files that take what is read: those, or others that they are
                made of.
            job: What the run was told.
            skips_bad: Whether bad rows may have been left out.
        """
        self.folder = _folder(prefix, names)
        self._prefix, self._names, self._growing, self._job = prefix, names, growing, job
        self._skips_bad = skips_bad
        self._writers: dict[str, IndexedWriter] = {}
        self._errors: TextIO | None = None
        self._noted = time.monotonic()
        self._note = _Note(asdict(job))
        self._errors_path = prefix.with_name(f"{prefix.name}.{_ERRORS}")

    @property
    def counts(self) -> Counts:
        """What was written so far, in this run and those that it goes on with."""
        return self._note.counts

    @property
    def place(self) -> Place:
        """Where in the input the next chunk is."""
        return self._note.place

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run had all files, and only their names are missing."""
        return self._note.is_finished

    def __enter__(self) -> "Output":
        with self.disk_errors_named(), contextlib.ExitStack() as stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = stack.enter_context((self.folder / _LOCK).open("w"))
            _lock(self._lock, self._prefix)
            try:
                self._go_on()
            except BaseException:
                self._leave()
                raise
            stack.pop_all()
        return self

    def _go_on(self) -> None:
        """Opens the files where an earlier run left them, or anew."""
        note = _Note.read(self.folder / _NOTE)
        if note and self._can_go_on(note):
            try:
                self._open(note)
            except ValueError as error:
                _log.warning("%s: it is begun anew", error)
            else:
                _log.warning(
                    "going on with an unfinished run, whose %s documents are kept",
                    f"{note.counts.documents:,}",
                )
                return
        if note:
            _log.warning("an unfinished run of other inputs or settings is removed")
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                path.unlink()
        self._open(_Note(asdict(self._job)))

    def _can_go_on(self, note: _Note) -> bool:
        if not self._job.equals(note.job) or (note.counts.bad_rows and not self._skips_bad):
            return False
        return not note.is_finished or self._is_whole()

    def _is_whole(self) -> bool:
        """Whether every finished file is in the folder, or has its name already."""
        try:
            sizes = json.loads((self.folder / _RECORD).read_text())["files"]
        except (OSError, ValueError, KeyError):
            return False
        places = {name: (self.folder / name, self._prefix.with_name(name)) for name in sizes}
        return all(
            any(path.exists() and path.stat().st_size == sizes[name] for path in paths)
            for name, paths in places.items()
        )

    def _open(self, note: _Note) -> None:
        self._note = note
        if note.is_finished:
            return
        for key, name in self._growing.items():
            mark = note.marks.get(key, Mark())
            self._writers[key] = IndexedWriter(self.folder / name, mark)
        path = self.folder / _ERRORS
        self._errors = path.open("r+" if note.error_bytes else "w", encoding="utf-8")
        self._errors.truncate(note.error_bytes)
        self._errors.seek(0, os.SEEK_END)

    def __exit__(self, *raised: object) -> None:
        self._leave()

    def _leave(self) -> None:
        """Lets go of all files; removes them unless a later run can go on with them."""
        files: list[IndexedWriter | TextIO] = [*self._writers.values()]
        for file in [*files, self._errors] if self._errors else files:
            with contextlib.suppress(OSError):  # what isn't noted is written again
                file.close()
        if (self.folder / _NOTE).is_file():
            documents = (_Note.read(self.folder / _NOTE) or self._note).counts.documents
            _log.warning("%s documents are kept: run the same again to go on", f"{documents:,}")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def add(self, encoded: Encoded, after: Place) -> None:
        """Appends what a chunk became, after which the input is at `after`."""
        with self.disk_errors_named():
            for key, writer in self._writers.items():
                part = encoded.keys[key]
                writer.add(part.tokens, part.lengths, part.sizes)
            for problem in encoded.problems:
                self._write_problem(problem)
            self._note.counts.add(encoded.counts)
            self._note.place = after
            if time.monotonic() - self._noted >= _SECONDS_BETWEEN_NOTES:
                self._write_note()

    def _write_problem(self, problem: RowProblem) -> None:
        assert self._errors is not None
        self._errors.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")

    def _write_note(self) -> None:
        if self._job.inputs is None:
            return  # a pipe: what was read from it is gone
        assert self._errors is not None
        self._errors.flush()
        os.fsync(self._errors.fileno())
        self._note.error_bytes = self._errors.tell()
        self._note.marks = {key: writer.mark() for key, writer in self._writers.items()}
        self._note.write(self.folder / _NOTE)
        self._noted = time.monotonic()

    def finish(self) -> dict[str, Path]:
        """Completes the growing files; the .bin of each by key."""
        with self.disk_errors_named():
            self._write_note()
            for writer in self._writers.values():
                writer.finish()
        return {key: writer.bin_path for key, writer in self._writers.items()}

    def complete(self, stats: dict[str, Any]) -> None:
        """Notes that all files are there, and what they are."""
        with self.disk_errors_named():
            write_json(self.folder / _RECORD, stats)
            self._note.is_finished = True
            self._note.write(self.folder / _NOTE)

    def publish(self) -> dict[str, Any]:
        """Gives all files their names; what they are."""
        with self.disk_errors_named():
            self._move()
            shutil.rmtree(self.folder)
            stats: dict[str, Any] = json.loads(_record(self._prefix, self._names).read_text())
            return stats

    def _move(self) -> None:
        for name in (f"{n}.{kind}" for kind in ("bin", "idx") for n in self._names.values()):
            source, target = self.folder / name, self._prefix.with_name(name)
            if not source.exists():  # it has its name already
                continue
            if target.suffix == ".bin":  # of an earlier run: it won't fit the new .bin
                target.with_suffix(".idx").unlink(missing_ok=True)
                shutil.rmtree(indices_of(target.with_suffix("")), ignore_errors=True)
            source.replace(target)
        if self._note.counts.bad_rows and (self.folder / _ERRORS).exists():
            (self.folder / _ERRORS).replace(self._errors_path)
        elif not self._note.counts.bad_rows:
            self._errors_path.unlink(missing_ok=True)  # of an earlier run
        record = self.folder / _RECORD
        if record.exists():
            show_stats(self._prefix, json.loads(record.read_text()))
            record.replace(_record(self._prefix, self._names))

    @contextlib.contextmanager
    def disk_errors_named(self) -> Iterator[None]:
        """Makes a sentence of what goes wrong while a file is written in the folder.

        Raises:
            DataError: The disk is full or failing.
        """
        try:
            yield
        except OSError as error:
            folder = self._prefix.parent
            raise DataError(
                f"can't write {error.filename or folder}: {error.strerror}",
                "choose another --output-prefix, or make room there",
            ) from None


def _lock(file: TextIO, prefix: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(
            f"another glm3 preprocess is writing {prefix}",
            "wait for it, or choose another --output-prefix",
        ) from None
    except OSError as error:  # some network file systems know no locks
        _log.warning("%s can't be locked (%s): don't write it twice at a time", prefix, error)


def finished(
    prefix: Path, names: Mapping[str, str], job: Job, *, skips_bad: bool
) -> dict[str, Any] | None:
    """The statistics of a finished run of the same job, if all its files are as it left them."""
    try:
        stats: dict[str, Any] = json.loads(_record(prefix, names).read_text())
        sizes = {name: prefix.with_name(name).stat().st_size for name in stats["files"]}
        is_same = job.equals(stats["job"]) and sizes == stats["files"]
        is_same = is_same and (skips_bad or not stats["bad_rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if is_same:
        _clear(_folder(prefix, names))
    return stats if is_same else None


def _clear(folder: Path) -> None:
    """Removes what a run left that was killed when all its files had their names."""
    note = _Note.read(folder / _NOTE)
    if not folder.is_dir() or (note and not note.is_finished):
        return
    with contextlib.suppress(OSError), (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)


def show_stats(prefix: Path, stats: dict[str, Any]) -> None:
    """Writes PREFIX.stats.json, if it isn't there with just that."""
    path = stats_path(prefix)
    with contextlib.suppress(OSError, ValueError):
        if json.loads(path.read_text("utf-8")) == stats:
            return
    write_json(path, stats)


def stats_path(prefix: Path) -> Path:
    """PREFIX.stats.json."""
    return prefix.with_name(f"{prefix.name}.stats.json")


def _folder(prefix: Path, names: Mapping[str, str]) -> Path:
    """Where a run keeps its files until they are complete."""
    return prefix.with_name(f".{next(iter(names.values()))}.unfinished")


def _record(prefix: Path, names: Mapping[str, str]) -> Path:
    """The statistics of the run that has written the files of these names."""
    return prefix.with_name(f".{next(iter(names.values()))}.{_RECORD}")
