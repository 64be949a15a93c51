"""Runs preprocess: reads raw data, tokenizes it, and writes the files that training reads.

`preprocess` does a whole run, `preview` encodes the first samples without writing anything, and
`finished_before` returns the result of an earlier run.
"""

import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from glm3cli.config.model import ModelConfig
from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.files import find_files
from glm3cli.data.kinds import WEIGHTS_KEY
from glm3cli.data.preprocess.counts import Counts
from glm3cli.data.preprocess.fields import RowError
from glm3cli.data.preprocess.handlers import Handler, build_handler, choose_columns
from glm3cli.data.preprocess.job import Job
from glm3cli.data.preprocess.note import Place
from glm3cli.data.preprocess.output import Output, finished, stats_path, write_stats
from glm3cli.data.preprocess.packing import pack_files
from glm3cli.data.preprocess.readers.chunks import Chunk
from glm3cli.data.preprocess.readers.sources import read_chunks, rows_of
from glm3cli.data.preprocess.statistics import statistics
from glm3cli.data.preprocess.workers import (
    SHOWN_PROBLEMS,
    Encoded,
    Encoder,
    RowProblem,
    bad_rows_error,
    encode_all,
    problem_of,
)
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import CheckpointError, DataError
from glm3cli.host.signals import stopped_by_sigterm

# In how many more chunks bad rows are searched after the first one, to show several at once.
_MORE_CHUNKS = 8
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


def preprocess(
    config: PreprocessConfig, report: Callable[[PreprocessProgress], None] = lambda progress: None
) -> Summary:
    """Turns raw data into token files; does nothing if the files exist, made by an equal run.

    Args:
        config: The options of the run.
        report: Called with the progress after every chunk and while samples are packed.

    Raises:
        DataError: The input is missing or bad, or the output can't be written.
        StoppedError: The process received SIGTERM.
    """
    start = time.perf_counter()
    tokenizer = Tokenizer.load(config.tokenizer)
    handler = build_handler(config, tokenizer)
    files = find_files(config.inputs)
    _check_vocabulary(config, tokenizer)
    job = Job.of(config, files, tokenizer)
    names = _names(config, handler)
    skips_bad = config.on_error == "skip"
    if not config.force:
        stats = finished(config.output_prefix, names, job, skips_bad=skips_bad)
        if stats is not None:
            _log.warning("%s is there already, of the same input", config.output_prefix)
            # A run of another handler may have overwritten PREFIX.stats.json.
            write_stats(config.output_prefix, stats)
            return _summary(config, stats, time.perf_counter() - start, repeated=True)
    samples = {key: f"{_SAMPLES}.{key}" for key in names} if config.pack else {}
    with (
        stopped_by_sigterm("preprocess", "run the same again to go on"),
        Output(config.output_prefix, names, samples or names, job, skips_bad=skips_bad) as output,
    ):
        if not output.is_finished:
            progress = PreprocessProgress(output.counts, output.counts.copy())
            _encode(config, tokenizer, files, handler, output, progress, report, start)
            if not output.counts.documents:
                raise DataError(
                    f"the input has no document to write ({output.counts.skipped} rows skipped)",
                    "check --input, --handler and --seq-length",
                )
            paths = output.finish()
            kept = dict(names)
            if WEIGHTS_KEY in paths and _all_ones(paths[WEIGHTS_KEY]):
                del kept[WEIGHTS_KEY]
            pack_length = config.pack_length
            with output.disk_errors_as_data_error():
                if pack_length:
                    packed = pack_files(output.folder, paths, pack_length, kept, handler.stride)
                    for progress.packed in packed:
                        report(progress)
                stats = statistics(job, output.counts, paths, kept, output.folder, pack_length)
                stats["lost"] = output.lost
            output.complete(stats)
        stats = output.publish()
    return _summary(config, stats, time.perf_counter() - start)


def _all_ones(weights: Path) -> bool:
    """Returns whether all samples weigh 1, so that no file need say so."""
    return bool((np.fromfile(weights, np.float32) == 1).all())


def finished_before(config: PreprocessConfig) -> Summary | None:
    """Returns the result of an earlier run of the same inputs and options.

    Returns:
        The result, or None if there was no such run or one of its files is missing.

    Raises:
        DataError: The input is missing.
    """
    start = time.perf_counter()
    tokenizer = Tokenizer.load(config.tokenizer)
    names = _names(config, build_handler(config, tokenizer))
    job = Job.of(config, find_files(config.inputs), tokenizer)
    stats = finished(config.output_prefix, names, job, skips_bad=config.on_error == "skip")
    if stats is None:
        return None
    return _summary(config, stats, time.perf_counter() - start, repeated=True)


def _check_vocabulary(config: PreprocessConfig, tokenizer: Tokenizer) -> None:
    """Checks that a model in the tokenizer's folder has an embedding for every id.

    Raises:
        DataError: The model's vocabulary is smaller than the tokenizer's.
    """
    if not (config.tokenizer / "config.json").is_file():
        return
    try:
        model = ModelConfig.from_file(config.tokenizer)
    except CheckpointError:  # preprocess only needs the folder's tokenizer
        return
    if tokenizer.vocab_size > model.padded_vocab_size:
        raise DataError(
            f"{tokenizer.path} has {tokenizer.vocab_size:,} ids, but the model beside it a "
            f"vocabulary of {model.padded_vocab_size:,}",
            "give the tokenizer that belongs to the model",
        )


def _encode(
    config: PreprocessConfig,
    tokenizer: Tokenizer,
    files: list[Path],
    handler: Handler,
    output: Output,
    progress: PreprocessProgress,
    report: Callable[[PreprocessProgress], None],
    start: float,
) -> None:
    """Encodes the input that isn't in the output yet, and appends it."""
    sizes = _Sizes(files)
    after: deque[Place] = deque()  # the position after each chunk that was read but not yet added
    chunks = _read_from(files, handler, output.place, after)
    with contextlib.closing(encode_all(config, tokenizer, chunks)) as encoded_chunks:
        for encoded in encoded_chunks:
            if config.on_error == "stop":
                if encoded.problems:
                    raise bad_rows_error(_first_problems(encoded, encoded_chunks))
                if encoded.damage:
                    raise encoded.damage
            elif encoded.damage:
                encoded.problems.append(RowProblem(encoded.source, "", encoded.damage.message, ""))
                output.lose(encoded.source, encoded.damage.share)
            encoded.counts.bad_rows = len(encoded.problems)
            output.add(encoded, after.popleft())
            progress.seconds = time.perf_counter() - start
            progress.done = max(progress.done, sizes.share(encoded))
            if not progress.begun and progress.before.documents:
                progress.begun = progress.done
            report(progress)


def _first_problems(encoded: Encoded, following: Iterator[Encoded]) -> list[RowProblem]:
    """Returns the bad rows of a chunk, and of a few following ones if they are few."""
    problems = list(encoded.problems)
    with contextlib.suppress(DataError):  # damage further on doesn't matter here
        for more in itertools.islice(following, _MORE_CHUNKS):
            if len(problems) >= SHOWN_PROBLEMS:
                break
            problems += more.problems
    return problems


def _names(config: PreprocessConfig, handler: Handler) -> dict[str, str]:
    """Returns the names of the output files without their endings, by output key."""
    name = f"{config.output_prefix.name}{handler.marker}"
    return {key: f"{name}_{key}_document" for key in handler.keys}


def _summary(
    config: PreprocessConfig, stats: dict, seconds: float, repeated: bool = False
) -> Summary:
    """Makes the result of a run out of its statistics and its wall time in seconds."""
    prefix = config.output_prefix
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


@dataclass(frozen=True)
class PreviewSample:
    """A sample that `--preview` shows.

    Attributes:
        where: The file and number of the sample's row.
        tokens: For each token, its spelling, its id, and its label: IGNORED_LABEL if it isn't
            trained, None if all tokens of the text are.
    """

    where: str
    tokens: list[tuple[str, int, int | None]]


def preview(config: PreprocessConfig) -> Iterator[PreviewSample]:
    """Encodes the first `config.preview` samples and writes nothing.

    Raises:
        DataError: The input is missing or bad.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    encoder = Encoder(config, tokenizer)
    left = config.preview
    for chunk in _read_from(find_files(config.inputs), encoder.handler, Place(), deque()):
        for index, row in enumerate(rows_of(chunk)):
            try:
                document = encoder.document(chunk, row)
            except RowError as error:
                raise bad_rows_error([problem_of(chunk, index, row, error)]) from None
            sequences = document.sequences if document else {}
            ids = sequences.get("input_ids") if encoder.handler.marker else None
            labels = sequences.get("labels") if encoder.handler.marker else None
            for i, sequence in enumerate(ids or [s for key in sequences.values() for s in key]):
                if not left:
                    return
                numbers = [int(token) for token in sequence]
                trained: list = list(labels[i]) if labels else [None] * len(numbers)
                spelled = [tokenizer.token_name(token) for token in numbers]
                yield PreviewSample(
                    chunk.where(index), list(zip(spelled, numbers, trained, strict=True))
                )
                left -= 1


def _read_from(
    files: list[Path], handler: Handler, place: Place, after: deque[Place]
) -> Iterator[Chunk]:
    """Yields the chunks from `place` on, and appends the position after each one to `after`."""
    skipped = place.chunk
    for i, path in enumerate(files[place.file :], start=place.file):
        chunks = read_chunks(path, partial(choose_columns, handler))
        for number, chunk in enumerate(chunks, start=1):
            if number > skipped:
                after.append(Place(i, number))
                yield chunk
        skipped = 0


class _Sizes:
    """Computes the share of all input that was read from a position in a file."""

    def __init__(self, files: list[Path]) -> None:
        self._before: dict[str, int] = {}
        self._total = 0
        for path in files:
            self._before.setdefault(str(path), self._total)
            self._total += path.stat().st_size if path.is_file() else 0

    def share(self, encoded: Encoded) -> float:
        if not self._total:
            return 0.0
        return min(1.0, (self._before[encoded.source] + encoded.position) / self._total)
