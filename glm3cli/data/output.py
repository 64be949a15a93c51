"""The files of a run of `preprocess`, from their first token until they have their names.

They grow in a hidden folder beside their target. Every few seconds a run notes how far all of them
are, once that is on the disk; what was written after the last note is cut off when a run that was
killed is started again. The finished files get their names one by one, the .idx after their .bin
and PREFIX.stats.json last: where it is, everything is.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from glm3cli.data.index_cache import indices_of
from glm3cli.data.indexed import IndexedWriter, Mark
from glm3cli.data.job import Job
from glm3cli.data.workers import Encoded, Problem
from glm3cli.errors import DataError

_SECONDS_BETWEEN_NOTES = 10.0
_ERRORS, _NOTE, _STATS, _LOCK = "errors.jsonl", "note.json", "stats.json", "lock"
_log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What was read and written.

    Attributes:
        documents: Rows that became a document.
        tokens: Tokens written, labels and masks not counted.
        bytes: Text encoded, as UTF-8.
        empty: Rows without any text.
        bad_rows: Bad rows, and rests of damaged files, left out.
        dropped: Samples of which --seq-length left no answer.
        truncated: Samples that --seq-length cut.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    bad_rows: int = 0
    dropped: int = 0
    truncated: int = 0

    @property
    def skipped(self) -> int:
        """Rows and samples that were left out."""
        return self.bad_rows + self.dropped

    def copy(self) -> "Counts":
        """The counts as they are now."""
        return replace(self)

    def add(self, encoded: Encoded) -> None:
        """Counts a chunk."""
        self.documents += encoded.num_documents
        self.tokens += encoded.num_tokens
        self.bytes += encoded.text_bytes
        self.empty += encoded.num_empty
        self.bad_rows += len(encoded.problems)
        self.dropped += encoded.num_dropped
        self.truncated += encoded.num_truncated


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
        stats_path: PREFIX.stats.json.
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
        self.folder = _folder(prefix)
        self._prefix, self._names, self._growing, self._job = prefix, names, growing, job
        self._skips_bad = skips_bad
        self._writers: dict[str, IndexedWriter] = {}
        self._errors: TextIO | None = None
        self._noted = time.monotonic()
        self._note = _Note(asdict(job))
        self.stats_path = prefix.with_name(f"{prefix.name}.{_STATS}")
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
        with self._disk_errors_named(), contextlib.ExitStack() as stack:
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
        usable = note and self._job.equals(note.job)
        if usable and note and (self._skips_bad or not note.counts.bad_rows):
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
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                path.unlink()
        self._open(_Note(asdict(self._job)))

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
        with self._disk_errors_named():
            for key, writer in self._writers.items():
                part = encoded.keys[key]
                writer.add(part.tokens, part.lengths, part.sizes)
            for problem in encoded.problems:
                self._write_problem(problem)
            self._note.counts.add(encoded)
            self._note.place = after
            if time.monotonic() - self._noted >= _SECONDS_BETWEEN_NOTES:
                self._write_note()

    def _write_problem(self, problem: Problem) -> None:
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
        with self._disk_errors_named():
            self._write_note()
            for writer in self._writers.values():
                writer.finish()
        return {key: writer.bin_path for key, writer in self._writers.items()}

    def complete(self, stats: dict[str, Any]) -> None:
        """Notes that all files are there, and what they are."""
        with self._disk_errors_named():
            write_json(self.folder / _STATS, stats)
            self._note.is_finished = True
            self._note.write(self.folder / _NOTE)

    def publish(self) -> dict[str, Any]:
        """Gives all files their names; what they are."""
        with self._disk_errors_named():
            self._move()
            shutil.rmtree(self.folder)
            stats: dict[str, Any] = json.loads(self.stats_path.read_text("utf-8"))
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
        if (self.folder / _STATS).exists():
            (self.folder / _STATS).replace(self.stats_path)

    @contextlib.contextmanager
    def _disk_errors_named(self) -> Iterator[None]:
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


def finished(prefix: Path, job: Job, *, skips_bad: bool) -> dict[str, Any] | None:
    """The statistics of a finished run of the same job, if all its files are as it left them."""
    try:
        text = prefix.with_name(f"{prefix.name}.{_STATS}").read_text("utf-8")
        stats: dict[str, Any] = json.loads(text)
        sizes = {name: prefix.with_name(name).stat().st_size for name in stats["files"]}
        is_same = job.equals(stats["job"]) and sizes == stats["files"]
        is_same = is_same and (skips_bad or not stats["bad_rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if is_same:  # it may have been killed when only the folder was left
        shutil.rmtree(_folder(prefix), ignore_errors=True)
    return stats if is_same else None


def _folder(prefix: Path) -> Path:
    """Where a run keeps its files until they are complete."""
    return prefix.with_name(f".{prefix.name}.unfinished")


def write_json(path: Path, values: object) -> None:
    """Writes a JSON file that is complete or as it was."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        json.dump(values, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
