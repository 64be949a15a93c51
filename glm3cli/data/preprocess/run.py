"""`preprocess`: reads raw data, tokenizes it, and writes what training reads."""

import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from glm3cli.config.model import ModelConfig
from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.files import find_files
from glm3cli.data.preprocess.chunks import Chunk, Damage
from glm3cli.data.preprocess.counts import Counts
from glm3cli.data.preprocess.handlers import Handler, build_handler, choose_columns
from glm3cli.data.preprocess.job import Job
from glm3cli.data.preprocess.output import Output, Place, finished, show_stats, stats_path
from glm3cli.data.preprocess.packing import pack_files
from glm3cli.data.preprocess.rows import RowError
from glm3cli.data.preprocess.sources import read_chunks, rows_of
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

# After the first bad row, how many chunks are searched for more to show.
_MORE_CHUNKS = 8
_SAMPLES = "samples"  # of which packs are made
_log = logging.getLogger(__name__)


@dataclass
class PreprocessProgress:
    """How far a run is.

    Attributes:
        counts: What was read and written.
        before: What of it was there when the run began.
        seconds: Since the run began.
        done: Share of the input that was read, 0 to 1; 0 for a pipe.
        begun: Share that had been read when the run began.
        packed: Share of the samples that are packed, once all input is read.
    """

    counts: Counts
    before: Counts
    seconds: float = 0.0
    done: float = 0.0
    begun: float = 0.0
    packed: float | None = None


@dataclass(frozen=True)
class Summary:
    """The result of a run; `seconds` is its wall time, `files` what it wrote.

    Attributes:
        repeated: Whether an earlier run had done it all.
    """

    documents: int
    tokens: int
    bytes: int
    seconds: float
    skipped: int
    truncated: int
    fill_rate: float | None
    stats: str
    repeated: bool = False
    files: list[str] = field(default_factory=list)


def preprocess(
    config: PreprocessConfig, report: Callable[[PreprocessProgress], None] = lambda progress: None
) -> Summary:
    """Turns the inputs into token files.

    Args:
        config: What to do.
        report: Called after every chunk.

    Raises:
        DataError: The input is missing or bad, or the output can't be written.
        StoppedError: SIGTERM came.
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
            show_stats(config.output_prefix, stats)  # texts may have followed, or conversations
            return _summary(config, stats, time.perf_counter() - start, repeated=True)
    samples = {key: f"{_SAMPLES}.{key}" for key in ("input_ids", "labels")} if config.pack else {}
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
            room = config.seq_length if config.pack else None
            with output.disk_errors_named():
                if room:
                    for progress.packed in pack_files(output.folder, paths, room, names):
                        report(progress)
                stats = statistics(job, output.counts, paths, names, output.folder, room)
            output.complete(stats)
        stats = output.publish()
    return _summary(config, stats, time.perf_counter() - start)


def finished_before(config: PreprocessConfig) -> Summary | None:
    """The result of an earlier run that was told the same, if all its files are there.

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
    """Checks that the model in the tokenizer's folder, if there is one, has a row for every id."""
    if not (config.tokenizer / "config.json").is_file():
        return
    try:
        model = ModelConfig.from_file(config.tokenizer)
    except CheckpointError:  # the tokenizer is all that is needed of the folder
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
    """Fills the output with all that isn't in it yet."""
    sizes = _Sizes(files)
    after: deque[Place] = deque()  # where the input is after each of the chunks on their way
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
            encoded.counts.bad_rows = len(encoded.problems)
            output.add(encoded, after.popleft())
            progress.seconds = time.perf_counter() - start
            progress.done = max(progress.done, sizes.share(encoded))
            if not progress.begun and progress.before.documents:
                progress.begun = progress.done
            report(progress)


def _first_problems(encoded: Encoded, following: Iterator[Encoded]) -> list[RowProblem]:
    problems = list(encoded.problems)
    with contextlib.suppress(DataError):  # the input's own damage, further on
        for more in itertools.islice(following, _MORE_CHUNKS):
            if len(problems) >= SHOWN_PROBLEMS:
                break
            problems += more.problems
    return problems


def _names(config: PreprocessConfig, handler: Handler) -> dict[str, str]:
    """The names of the files, without their endings, by output key."""
    name = f"{config.output_prefix.name}{handler.marker}"
    return {key: f"{name}_{key}_document" for key in handler.keys}


def _summary(
    config: PreprocessConfig, stats: dict, seconds: float, repeated: bool = False
) -> Summary:
    prefix = config.output_prefix
    counts = {name: stats[name] for name in ("documents", "tokens", "bytes", "truncated")}
    return Summary(
        **counts,
        seconds=seconds,
        skipped=stats["bad_rows"] + stats["dropped"],
        fill_rate=stats["fill_rate"],
        stats=str(stats_path(prefix)),
        repeated=repeated,
        files=[str(prefix.with_name(name)) for name in stats["files"]],
    )


@dataclass(frozen=True)
class Shown:
    """A sample to look at: each token's text, its id, and whether it is trained."""

    where: str
    tokens: list[tuple[str, int, int | None]]


def preview(config: PreprocessConfig) -> Iterator[Shown]:
    """The first `config.preview` samples as (token, id, label); label None for plain text.

    Raises:
        DataError: The input is missing or bad.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    encoder = Encoder(config, tokenizer)
    left = config.preview
    for chunk in _read_from(find_files(config.inputs), encoder.handler, Place(), deque()):
        for index, raw in enumerate(rows_of(chunk)):
            try:
                document = encoder.document(chunk, raw)
            except RowError as error:
                raise bad_rows_error([problem_of(chunk, index, raw, error)]) from None
            sequences = document.sequences if document else {}
            ids = sequences.get("input_ids") if encoder.handler.marker else None
            labels = sequences.get("labels") if encoder.handler.marker else None
            for i, sequence in enumerate(ids or [s for key in sequences.values() for s in key]):
                if not left:
                    return
                numbers = [int(token) for token in sequence]
                trained: list = list(labels[i]) if labels else [None] * len(numbers)
                spelled = [tokenizer.token_name(token) for token in numbers]
                yield Shown(chunk.where(index), list(zip(spelled, numbers, trained, strict=True)))
                left -= 1


def _read_from(
    files: list[Path], handler: Handler, place: Place, after: deque[Place]
) -> Iterator[Chunk]:
    """The chunks from `place` on; appends to `after` where the input is after each."""
    skipped = place.chunk
    for i, path in enumerate(files[place.file :], start=place.file):
        chunks = _with_damage(path, read_chunks(path, partial(choose_columns, handler)))
        for number, chunk in enumerate(chunks, start=1):
            if number > skipped:
                after.append(Place(i, number))
                yield chunk
        skipped = 0


def _with_damage(path: Path, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The chunks of a file, and one that tells of its damage in its turn."""
    try:
        yield from chunks
    except DataError as error:
        yield Damage(str(path), 1, "row", [], 0, error)


class _Sizes:
    """Tells from a file and a position in it how much of all input was read."""

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
