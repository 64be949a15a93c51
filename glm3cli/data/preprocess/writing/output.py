"""Writes the output files of a run of preprocess so that a killed run can be resumed.

The files grow in a hidden folder beside their destination. Every few seconds the run saves a note
of how much of each file is on the disk; when a run that was killed is started again, it cuts off
what was written after the last note and continues from there. The finished files are moved to
their destination one by one, every .idx after its .bin, and a hidden record of the run last: if the
record exists, so does everything else. Folder and record are named after the first of the files,
since texts and conversations may have the same prefix.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from glm3cli.data.index_cache import indices_of
from glm3cli.data.indexed import IndexedWriter, Mark
from glm3cli.data.preprocess.counts import Counts
from glm3cli.data.preprocess.job import Job
from glm3cli.data.preprocess.readers.inputs import Place
from glm3cli.data.preprocess.workers import Encoded, RowProblem
from glm3cli.data.preprocess.writing.note import Note
from glm3cli.data.preprocess.writing.records import (
    ERRORS,
    RECORD,
    errors_path,
    record_path,
    write_stats,
)
from glm3cli.errors import DataError
from glm3cli.host.files import write_json

_SECONDS_BETWEEN_NOTES = 10.0
# Further files in the hidden folder: the note, and an empty file that the run keeps locked.
_NOTE, _LOCK = "note.json", "lock"
_log = logging.getLogger(__name__)


class Output:
    """The output files of a run, as a context manager that opens and closes them.

    Attributes:
        folder: The hidden folder in which the files grow.
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
        """Takes the names of the files; entering the context opens them.

        Args:
            prefix: The value of --output-prefix.
            names: The names of the finished files without their endings, by output key.
            growing: The names of the files that `add` writes into, by output key: those of `names`,
                or others from which the finished files are made.
            job: The inputs, tokenizer and settings of the run.
            skips_bad: Whether the run may leave out bad rows.
        """
        self.folder = _work_folder(prefix, names)
        self._prefix, self._names, self._growing, self._job = prefix, names, growing, job
        self._skips_bad = skips_bad
        self._writers: dict[str, IndexedWriter] = {}
        self._errors: TextIO | None = None
        self._noted = time.monotonic()
        self._note = Note(asdict(job))
        self._errors_path = errors_path(prefix)

    @property
    def counts(self) -> Counts:
        """What was written so far, by this run and by those that it resumes."""
        return self._note.counts

    @property
    def place(self) -> Place:
        """The position in the input of the next chunk."""
        return self._note.place

    @property
    def begin(self) -> Place | None:
        """The position in the input at which the run began; None before its first chunk."""
        return self._note.begin

    def note_begin(self, place: Place | None) -> None:
        """Notes where in the input the run began, unless an earlier run has."""
        self._note.begin = self._note.begin or place

    @property
    def lost(self) -> dict[str, float | None]:
        """The share of every damaged input file that is lost; None if it can't be told."""
        return self._note.lost

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run completed all files, which only have to be moved."""
        return self._note.is_finished

    def __enter__(self) -> "Output":
        with self.disk_errors_as_data_error(), contextlib.ExitStack() as stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = stack.enter_context((self.folder / _LOCK).open("w"))
            _lock(self._lock, self._prefix)
            try:
                self._resume()
            except BaseException:
                self._close()
                raise
            stack.pop_all()
        return self

    def _resume(self) -> None:
        """Opens the files of an unfinished run of the same job, or else new ones."""
        note = Note.read(self.folder / _NOTE)
        if note and self._can_resume(note):
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
        self._open(Note(asdict(self._job)))

    def _can_resume(self, note: Note) -> bool:
        """Returns whether the files of an unfinished run are what this run would have written."""
        if not self._job.equals(note.job) or (note.counts.bad_rows and not self._skips_bad):
            return False
        if note.marks and note.marks.keys() != self._growing.keys():  # of an older version
            return False
        return not note.is_finished or self._is_whole()

    def _is_whole(self) -> bool:
        """Returns whether every finished file is in the folder or at its destination."""
        try:
            sizes = json.loads((self.folder / RECORD).read_text())["files"]
        except (OSError, ValueError, KeyError):
            return False
        places = {name: (self.folder / name, self._prefix.with_name(name)) for name in sizes}
        return all(
            any(path.exists() and path.stat().st_size == sizes[name] for path in paths)
            for name, paths in places.items()
        )

    def _open(self, note: Note) -> None:
        """Opens all files at the positions in a note; raises ValueError if one is too short."""
        self._note = note
        if note.is_finished:
            return
        for key, name in self._growing.items():
            mark = note.marks.get(key, Mark())
            self._writers[key] = IndexedWriter(self.folder / name, mark)
        path = self.folder / ERRORS
        self._errors = path.open(
            "r+" if note.error_bytes else "w", encoding="utf-8", errors="backslashreplace"
        )
        self._errors.truncate(note.error_bytes)
        self._errors.seek(0, os.SEEK_END)

    def __exit__(self, *raised: object) -> None:
        self._close()

    def _close(self) -> None:
        """Closes all files; removes them unless a later run can resume from them."""
        files: list[IndexedWriter | TextIO] = [*self._writers.values()]
        for file in [*files, self._errors] if self._errors else files:
            with contextlib.suppress(OSError):  # what is after the last note is written again
                file.close()
        if (self.folder / _NOTE).is_file():
            documents = (Note.read(self.folder / _NOTE) or self._note).counts.documents
            _log.warning("%s documents are kept: run the same again to go on", f"{documents:,}")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def add(self, encoded: Encoded, after: Place) -> None:
        """Appends the documents and bad rows of a chunk.

        Args:
            encoded: The documents and bad rows.
            after: The position in the input after the chunk.

        Raises:
            DataError: The disk is full or failing.
        """
        with self.disk_errors_as_data_error():
            for key, writer in self._writers.items():
                documents = encoded.keys[key]
                writer.add(documents.tokens, documents.lengths, documents.sizes)
            for problem in encoded.problems:
                self._write_problem(problem)
            self._note.counts.add(encoded.counts)
            self._note.place = after
            if time.monotonic() - self._noted >= _SECONDS_BETWEEN_NOTES:
                self._write_note()

    def lose(self, source: str, share: float | None) -> None:
        """Counts a share of an input file as lost, with what of it was lost before.

        Args:
            source: The path of the file.
            share: The share, 0 to 1; None if it can't be told.
        """
        before = self.lost.get(source, 0.0)
        if share is not None and before is not None:
            share = min(1.0, share + before)
        self.lost[source] = None if before is None else share

    def _write_problem(self, problem: RowProblem) -> None:
        assert self._errors is not None
        self._errors.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")

    def _write_note(self) -> None:
        """Saves how much of every file is on the disk; does nothing for a pipe."""
        if self._job.inputs is None:  # a pipe can't be read again, so the run can't be resumed
            return
        assert self._errors is not None
        self._errors.flush()
        os.fsync(self._errors.fileno())
        self._note.error_bytes = self._errors.tell()
        self._note.marks = {key: writer.mark() for key, writer in self._writers.items()}
        self._note.write(self.folder / _NOTE)
        self._noted = time.monotonic()

    def finish(self) -> dict[str, Path]:
        """Completes the growing files.

        Returns:
            The path of the .bin file of each, by output key.

        Raises:
            DataError: The disk is full or failing.
        """
        with self.disk_errors_as_data_error():
            self._write_note()
            for writer in self._writers.values():
                writer.finish()
        return {key: writer.bin_path for key, writer in self._writers.items()}

    def complete(self, stats: dict[str, Any]) -> None:
        """Saves that all finished files are in the folder.

        Args:
            stats: The statistics of the run, with the names and sizes of the files.

        Raises:
            DataError: The disk is full or failing.
        """
        with self.disk_errors_as_data_error():
            write_json(self.folder / RECORD, stats)
            self._note.is_finished = True
            self._note.write(self.folder / _NOTE)

    def publish(self) -> dict[str, Any]:
        """Moves all files to their destination and removes the folder.

        Returns:
            The statistics that `complete` saved, in this run or an earlier one.

        Raises:
            DataError: The disk is full or failing.
        """
        with self.disk_errors_as_data_error():
            self._move()
            shutil.rmtree(self.folder)
            stats: dict[str, Any] = json.loads(record_path(self._prefix, self._names).read_text())
            return stats

    def _move(self) -> None:
        """Moves the files that aren't at their destination yet, the record last.

        Those that the record doesn't have are removed there: they are of an earlier run.
        """
        record = self.folder / RECORD
        finished = json.loads(record.read_text())["files"] if record.exists() else None
        for name in (f"{n}.{ending}" for ending in ("bin", "idx") for n in self._names.values()):
            source, target = self.folder / name, self._prefix.with_name(name)
            if finished is not None and name not in finished:
                target.unlink(missing_ok=True)
                continue
            if not source.exists():  # an earlier run has moved it
                continue
            if target.suffix == ".bin":  # an earlier run's .idx won't fit the new .bin
                target.with_suffix(".idx").unlink(missing_ok=True)
                shutil.rmtree(indices_of(target.with_suffix("")), ignore_errors=True)
            source.replace(target)
        if self._note.counts.bad_rows and (self.folder / ERRORS).exists():
            (self.folder / ERRORS).replace(self._errors_path)
        elif not self._note.counts.bad_rows:
            self._errors_path.unlink(missing_ok=True)  # an earlier run's
        if record.exists():
            write_stats(self._prefix, json.loads(record.read_text()))
            record.replace(record_path(self._prefix, self._names))

    @contextlib.contextmanager
    def disk_errors_as_data_error(self) -> Iterator[None]:
        """Turns errors while a file is written into one that names the file or the folder.

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
    """Locks a file for as long as it is open; raises DataError if another run holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(
            f"another glm3 preprocess is writing {prefix}",
            "wait for it, or choose another --output-prefix",
        ) from None
    except OSError as error:  # some network file systems have no locks
        _log.warning("%s can't be locked (%s): don't write it twice at a time", prefix, error)


def finished(
    prefix: Path, names: Mapping[str, str], job: Job, *, skips_bad: bool
) -> dict[str, Any] | None:
    """Returns the statistics of a finished run of the same job.

    Args:
        prefix: The value of --output-prefix.
        names: The names of the finished files without their endings, by output key.
        job: The inputs, tokenizer and settings of the run.
        skips_bad: Whether the finished run may have left out bad rows.

    Returns:
        The statistics, or None if there was no such run, or a file is missing or has another size.
    """
    try:
        stats: dict[str, Any] = json.loads(record_path(prefix, names).read_text())
        sizes = {name: prefix.with_name(name).stat().st_size for name in stats["files"]}
        is_same = job.equals(stats["job"]) and sizes == stats["files"]
        is_same = is_same and (skips_bad or not stats["bad_rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if is_same:
        _remove_leftovers(_work_folder(prefix, names))
    return stats if is_same else None


def _remove_leftovers(folder: Path) -> None:
    """Removes the folder of a run that was killed after it had moved all its files."""
    note = Note.read(folder / _NOTE)
    if not folder.is_dir() or (note and not note.is_finished):
        return
    with contextlib.suppress(OSError), (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)


def _work_folder(prefix: Path, names: Mapping[str, str]) -> Path:
    """Returns the path of the hidden folder in which the files of a run grow."""
    return prefix.with_name(f".{next(iter(names.values()))}.unfinished")
