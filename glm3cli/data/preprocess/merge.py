"""`merge`: joins the parts of a run that were preprocessed on several machines.

A part lies in a folder of its own: files as `preprocess` writes them, and a hidden record that says
which part it is, where in the input it begins and ends, and what is still to be done with all
samples together. The parts of a run follow each other without a gap, so that the joined files have
the bytes that a single machine would have written.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.files import matching_paths
from glm3cli.data.indexed import IndexedDocuments
from glm3cli.data.preprocess.counts import Counts
from glm3cli.data.preprocess.handlers import Handler
from glm3cli.data.preprocess.job import Job
from glm3cli.data.preprocess.readers.inputs import Inputs, Place
from glm3cli.data.preprocess.workers import Encoded, KeyDocuments, RowProblem
from glm3cli.data.preprocess.writing.output import Output
from glm3cli.data.preprocess.writing.records import errors_path, records
from glm3cli.data.preprocess.writing.write import (
    Plan,
    PreprocessProgress,
    Summary,
    done_before,
    file_names,
    write,
)
from glm3cli.errors import DataError

_DOCUMENTS = 1 << 18  # of a key, copied at a time
_AGAIN = "run all parts with the same --input, --tokenizer and settings, and the same glm3"


@dataclass(frozen=True)
class PartRecord:
    """What the record of a part says, beside what that of every run does.

    Attributes:
        number: The number of the part, from 1.
        count: The number of all parts.
        begin: The position in the input at which it begins: files done, chunks of the next done.
        end: The position in the input at which it ends.
        name: The start of the names of its files.
        marker: What stands between that and the output key.
        keys: The output keys.
        stride: The number of segment ids that a sample takes in a pack.
        pack_length: The number of tokens of the packs that a merge makes; None if it makes none.
    """

    number: int
    count: int
    begin: list[int]
    end: list[int]
    name: str
    marker: str
    keys: list[str]
    stride: int
    pack_length: int | None


def part_record(
    config: PreprocessConfig, handler: Handler, begin: Place | None, inputs: Inputs
) -> dict[str, Any]:
    """Returns what the record of a part that was just encoded says, as JSON values.

    Args:
        config: The options of its run.
        handler: The handler of its run.
        begin: The position in the input at which the part begins.
        inputs: The input, which was read to the part's end.
    """
    assert begin is not None
    assert inputs.end is not None
    number, count = config.part_numbers
    record = PartRecord(
        number=number,
        count=count,
        begin=[begin.file, begin.chunk],
        end=[inputs.end.file, inputs.end.chunk],
        name=config.prefix.name,
        marker=handler.marker,
        keys=list(handler.keys),
        stride=handler.stride,
        pack_length=config.pack_length,
    )
    return asdict(record)


@dataclass(frozen=True)
class _Part:
    """A finished part.

    Attributes:
        folder: Its folder.
        record: What a merge needs to know of it.
        stats: The statistics of its run.
    """

    folder: Path
    record: PartRecord
    stats: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "_Part":
        """Reads a part's record and checks that its files are there.

        Raises:
            DataError: The part is missing, unfinished, damaged, or one of several in its folder.
        """
        found = [stats for stats in records(folder) if "part" in stats]
        if len(found) != 1:
            kinds = " and ".join(str(stats["job"]["settings"]["handler"]) for stats in found)
            raise DataError(
                f"--merge {folder} has the parts of two runs ({kinds})"
                if found
                else f"--merge {folder} has no finished part",
                "give each run an --output-prefix of its own"
                if found
                else "give the folders that `glm3 preprocess --part` has written, to the end",
            )
        [stats] = found
        for name, size in stats["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise DataError(
                    f"--merge {folder}: {name} is missing or damaged", "copy or make it again"
                )
        return cls(folder, PartRecord(**stats["part"]), stats)

    @property
    def job(self) -> dict[str, Any]:
        """The job of the whole run: that of the part without its number."""
        job: dict[str, Any] = self.stats["job"]
        settings = {name: value for name, value in job["settings"].items() if name != "part"}
        return {**job, "settings": settings}

    @property
    def comparable(self) -> list[Any]:
        """What the parts of a run have in common, on machines that have their own copies."""
        job, record = self.job, self.record
        inputs = [(Path(path).name, size) for path, size, _ in job["inputs"]]
        return [{**job, "inputs": inputs}, record.count, record.marker, record.keys]

    def blocks(self) -> Iterator[Encoded]:
        """Yields all documents in blocks; the last has the counts and the bad rows of the part."""
        names = file_names(self.folder / self.record.name, self.record.marker, self.record.keys)
        files = {
            key: IndexedDocuments(self.folder / name, f"--merge {self.folder}")
            for key, name in names.items()
        }
        count = max(1, *(-(-len(file) // _DOCUMENTS) for file in files.values()))
        for number in range(1, count + 1):
            keys = {key: KeyDocuments(*file.take(_DOCUMENTS)) for key, file in files.items()}
            block = Encoded(str(self.folder), number, keys)
            if number == count:
                names_of_counts = [field.name for field in fields(Counts)]
                block.counts = Counts(**{name: self.stats[name] for name in names_of_counts})
                block.problems = self._problems() if block.counts.bad_rows else []
            yield block

    def _problems(self) -> list[RowProblem]:
        """Returns the bad rows that the part has left out."""
        path = errors_path(self.folder / self.record.name)
        return [RowProblem(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def merge(config: PreprocessConfig, report: Callable[[PreprocessProgress], None]) -> Summary:
    """Joins parts; does nothing if the files exist, made of the same input.

    Args:
        config: The options, with the parts' folders.
        report: Called with the progress after every block of documents and while samples are
            packed.

    Raises:
        DataError: A part is missing or damaged, they aren't the parts of one run, or the output
            can't be written.
        StoppedError: The process received SIGTERM.
    """
    start = time.perf_counter()
    parts = sorted(map(_Part.read, _folders(config)), key=lambda part: part.record.number)
    _check_one_run(parts)
    record = parts[0].record
    plan = Plan(
        prefix=config.prefix,
        names=file_names(config.prefix, record.marker, record.keys),
        job=Job(**parts[0].job),
        skips_bad=True,
        stride=record.stride,
        pack_length=record.pack_length,
        is_part=False,
    )
    if not config.force and (done := done_before(plan, start)):
        return done

    def join(output: Output, progress: PreprocessProgress) -> None:
        done, sizes = output.place, [sum(part.stats["files"].values()) for part in parts]
        for number, part in enumerate(parts[done.file :], start=done.file):
            skipped = done.chunk if number == done.file else 0
            for block in itertools.islice(part.blocks(), skipped, None):
                if block.problems:  # the last block, where anything was left out
                    for source, share in part.stats["lost"].items():
                        output.lose(source, share)
                output.add(block, Place(number, block.position))
                progress.seconds = time.perf_counter() - start
                progress.done = sum(sizes[: number + 1]) / sum(sizes)
                report(progress)

    return write(plan, join, report, start)


def _folders(config: PreprocessConfig) -> list[Path]:
    """Returns the folders that --merge names; the shell may have left a pattern to us.

    Raises:
        DataError: There is no such folder.
    """
    named = [*config.merge, *config.more_input]
    found = [
        folder
        for path in named
        for folder in ([path] if path.exists() else sorted(matching_paths(path)) or [path])
    ]
    for path in found:
        if not path.is_dir():
            raise DataError(
                f"--merge {path} is no folder",
                "give the folders that `glm3 preprocess --part` has written",
            )
    return list(dict.fromkeys(found))


def _check_one_run(parts: Sequence[_Part]) -> None:
    """Checks that parts are all those of one run, in their order.

    Raises:
        DataError: One is missing or twice there, they differ in what they were made of, or rows
            are missing between two.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.comparable != first.comparable:
            raise DataError(
                f"--merge {first.folder} and {part.folder} are parts of different runs", _AGAIN
            )
    numbers, count = [part.record.number for part in parts], first.record.count
    missing = sorted(set(range(1, count + 1)) - set(numbers))
    if missing or len(numbers) > count:
        what = f"lacks part {missing[0]}" if missing else "has a part twice"
        raise DataError(f"--merge {what} of {count}", "give the folder of each part, once")
    ends = [[0, 0], *(part.record.end for part in parts)]
    for part, end in zip(parts, ends, strict=False):
        if part.record.begin != end:
            raise DataError(
                f"--merge {part.folder} doesn't begin where the part before it ends, since their "
                "machines have read the input in different ways",
                _AGAIN,
            )
