"""`write`: writes the files of a run, whatever appends their documents, and resumes it.

A `Plan` says which files, and the job that they come from. `run` appends documents that it encodes,
`merge` those that the parts of a run have.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.files import find_files
from glm3cli.data.kinds import WEIGHTS_KEY
from glm3cli.data.preprocess.counts import Counts
from glm3cli.data.preprocess.handlers import Handler
from glm3cli.data.preprocess.job import Job
from glm3cli.data.preprocess.writing.output import Output, finished
from glm3cli.data.preprocess.writing.packing import pack_files
from glm3cli.data.preprocess.writing.records import stats_path, write_stats
from glm3cli.data.preprocess.writing.statistics import statistics
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError
from glm3cli.host.signals import stopped_by_sigterm

_SAMPLES = "samples"  # beginning of the names of files with samples that are still to be packed
_log = logging.getLogger(__name__)


@dataclass
class PreprocessProgress:
    """The progress of a run.

    Attributes:
        counts: What was read and written, earlier runs that this run resumes included.
        before: The counts of those earlier runs.
        seconds: The time since the run began, in seconds.
        done: The share of the input that was read, 0 to 1; always 0 for a pipe.
        begun: The share of the input that earlier runs had read, 0 to 1.
        packed: The share of the samples that are packed, 0 to 1; None before all input is read.
    """

    counts: Counts
    before: Counts
    seconds: float = 0.0
    done: float = 0.0
    begun: float = 0.0
    packed: float | None = None


@dataclass(frozen=True)
class Summary:
    """The result of a run; `--json` prints these fields.

    Attributes:
        documents: The number of rows that became a document.
        tokens: The number of tokens written, without labels and masks.
        bytes: The size of the encoded text, in bytes of UTF-8.
        seconds: The wall time of the run, in seconds.
        skipped: The number of rows and samples that were left out.
        truncated: The number of samples that --seq-length cut.
        equal: The number of pairs that were left out because their answers are the same.
        fill_rate: The share of the packs' positions that hold a token, 0 to 1; None without packs.
        stats: The path of PREFIX.stats.json.
        lost: For every input file that could not be read whole, the share of it that is lost, 0 to
            1, or None if that can't be told.
        repeated: Whether an earlier run had written all files already.
        files: The paths of the files that were written.
    """

    documents: int
    tokens: int
    bytes: int
    seconds: float
    skipped: int
    truncated: int
    equal: int
    fill_rate: float | None
    stats: str
    lost: dict[str, float | None] = field(default_factory=dict)
    repeated: bool = False
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """The files that a run writes, and what they are made of.

    Attributes:
        prefix: The start of the files' names.
        names: The names of the files without their endings, by output key.
        job: The inputs, tokenizer and settings of the run.
        skips_bad: Whether the run may leave out bad rows.
        stride: The number of segment ids that a sample takes in a pack.
        pack_length: The number of tokens of a pack; None if samples aren't packed.
        is_part: Whether other parts will be joined with these files, so that nothing that depends
            on all samples, such as packing, can be done yet.
    """

    prefix: Path
    names: dict[str, str]
    job: Job
    skips_bad: bool
    stride: int
    pack_length: int | None
    is_part: bool

    @classmethod
    def of(cls, config: PreprocessConfig, tokenizer: Tokenizer, handler: Handler) -> "Plan":
        """Returns the plan of a run with these options.

        Raises:
            DataError: The input is missing.
        """
        return cls(
            prefix=config.prefix,
            names=file_names(config.prefix, handler.marker, handler.keys),
            job=Job.of(config, find_files(config.inputs), tokenizer),
            skips_bad=config.on_error == "skip",
            stride=handler.stride,
            pack_length=config.pack_length,
            is_part=config.part is not None,
        )


def file_names(prefix: Path, marker: str, keys: Iterable[str]) -> dict[str, str]:
    """Returns the names of the output files without their endings, by output key.

    Args:
        prefix: The start of the files' names.
        marker: What stands between the prefix and the key.
        keys: The output keys.
    """
    return {key: f"{prefix.name}{marker}_{key}_document" for key in keys}


def write(
    plan: Plan,
    fill: Callable[[Output, PreprocessProgress], dict[str, Any] | None],
    report: Callable[[PreprocessProgress], None],
    start: float,
) -> Summary:
    """Writes the files of a run, or goes on with those of a run that didn't end.

    Args:
        plan: What to write.
        fill: Appends all documents that the output doesn't have yet. What it returns is noted in
            the statistics as the fields of the part.
        report: Called with the progress while samples are packed.
        start: The time at which the run began, of `time.perf_counter`.

    Raises:
        DataError: There is no document, or the output can't be written.
        StoppedError: The process received SIGTERM.
    """
    names, pack_length = plan.names, None if plan.is_part else plan.pack_length
    samples = {key: f"{_SAMPLES}.{key}" for key in names} if pack_length else names
    with (
        stopped_by_sigterm("preprocess", "run the same again to go on"),
        Output(plan.prefix, names, samples, plan.job, skips_bad=plan.skips_bad) as output,
    ):
        if not output.is_finished:
            progress = PreprocessProgress(output.counts, output.counts.copy())
            part = fill(output, progress)
            if not output.counts.documents and not plan.is_part:
                raise DataError(
                    f"the input has no document to write ({output.counts.skipped} rows skipped)",
                    "check --input, --handler and --seq-length",
                )
            paths = output.finish()
            kept = dict(names)
            if WEIGHTS_KEY in paths and not plan.is_part and _all_ones(paths[WEIGHTS_KEY]):
                del kept[WEIGHTS_KEY]
            with output.disk_errors_as_data_error():
                if pack_length:
                    packed = pack_files(output.folder, paths, pack_length, kept, plan.stride)
                    for progress.packed in packed:
                        report(progress)
                stats = statistics(plan.job, output.counts, paths, kept, output.folder, pack_length)
            stats |= {"lost": output.lost} | ({"part": part} if part else {})
            output.complete(stats)
        stats = output.publish()
    return summary_of(plan.prefix, stats, time.perf_counter() - start)


def done_before(plan: Plan, start: float) -> Summary | None:
    """Returns the result of an equal run that wrote all files before; None if there is none.

    Args:
        plan: What to write.
        start: The time at which the run began, of `time.perf_counter`.
    """
    stats = finished(plan.prefix, plan.names, plan.job, skips_bad=plan.skips_bad)
    if stats is None:
        return None
    _log.warning("%s is there already, of the same input", plan.prefix)
    write_stats(plan.prefix, stats)  # a run of another handler may have overwritten them
    return summary_of(plan.prefix, stats, time.perf_counter() - start, repeated=True)


def _all_ones(weights: Path) -> bool:
    """Returns whether all samples weigh 1, so that no file need say so."""
    return bool((np.fromfile(weights, np.float32) == 1).all())


def summary_of(prefix: Path, stats: dict, seconds: float, repeated: bool = False) -> Summary:
    """Makes the result of a run out of its statistics and its wall time in seconds."""
    counts = {name: stats[name] for name in ("documents", "tokens", "bytes", "truncated", "equal")}
    return Summary(
        **counts,
        seconds=seconds,
        skipped=stats["bad_rows"] + stats["dropped"] + stats["equal"],
        fill_rate=stats["fill_rate"],
        stats=str(stats_path(prefix)),
        lost=stats.get("lost", {}),
        repeated=repeated,
        files=[str(prefix.with_name(name)) for name in stats["files"]],
    )
