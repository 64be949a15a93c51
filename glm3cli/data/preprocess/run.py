"""Runs preprocess: reads raw data, tokenizes it, and writes the files that training reads.

`preprocess` does a whole run, `preview` encodes the first samples without writing anything, and
`finished_before` returns the result of an earlier run.
"""

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from glm3cli.config.model import ModelConfig
from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.files import find_files
from glm3cli.data.preprocess.fields import RowError
from glm3cli.data.preprocess.handlers import Handler, build_handler, choose_columns
from glm3cli.data.preprocess.merge import merge, part_record
from glm3cli.data.preprocess.readers.inputs import Inputs, Place
from glm3cli.data.preprocess.readers.sources import rows_of
from glm3cli.data.preprocess.workers import (
    SHOWN_PROBLEMS,
    Encoded,
    Encoder,
    RowProblem,
    bad_rows_error,
    encode_all,
    problem_of,
)
from glm3cli.data.preprocess.writing.output import Output, finished
from glm3cli.data.preprocess.writing.write import (
    Plan,
    PreprocessProgress,
    Summary,
    done_before,
    summary_of,
    write,
)
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import CheckpointError, DataError

# In how many more chunks bad rows are searched after the first one, to show several at once.
_MORE_CHUNKS = 8


def preprocess(
    config: PreprocessConfig, report: Callable[[PreprocessProgress], None] = lambda progress: None
) -> Summary:
    """Turns raw data into token files; does nothing if the files exist, made by an equal run.

    With `config.merge`, the token files of parts are joined instead.

    Args:
        config: The options of the run.
        report: Called with the progress after every chunk and while samples are packed.

    Raises:
        DataError: The input is missing or bad, or the output can't be written.
        StoppedError: The process received SIGTERM.
    """
    if config.merge:
        return merge(config, report)
    start = time.perf_counter()
    tokenizer = Tokenizer.load(config.tokenizer_path)
    handler = build_handler(config, tokenizer)
    plan = Plan.of(config, tokenizer, handler)
    _check_vocabulary(config.tokenizer_path, tokenizer)
    if not config.force and (done := done_before(plan, start)):
        return done

    def encode(output: Output, progress: PreprocessProgress) -> dict[str, Any] | None:
        inputs = Inputs(find_files(config.inputs), config.part_numbers)
        _encode(config, tokenizer, inputs, handler, output, progress, report, start)
        return part_record(config, handler, output.begin, inputs) if plan.is_part else None

    return write(plan, encode, report, start)


def finished_before(config: PreprocessConfig) -> Summary | None:
    """Returns the result of an earlier run of the same inputs and options.

    Returns:
        The result, or None if there was no such run or one of its files is missing.

    Raises:
        DataError: The input is missing.
    """
    start = time.perf_counter()
    tokenizer = Tokenizer.load(config.tokenizer_path)
    plan = Plan.of(config, tokenizer, build_handler(config, tokenizer))
    stats = finished(plan.prefix, plan.names, plan.job, skips_bad=plan.skips_bad)
    if stats is None:
        return None
    return summary_of(plan.prefix, stats, time.perf_counter() - start, repeated=True)


def _check_vocabulary(place: Path, tokenizer: Tokenizer) -> None:
    """Checks that a model in the tokenizer's place has an embedding for every id.

    Raises:
        DataError: The model's vocabulary is smaller than the tokenizer's.
    """
    if not (place / "config.json").is_file():
        return
    try:
        model = ModelConfig.from_file(place)
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
    inputs: Inputs,
    handler: Handler,
    output: Output,
    progress: PreprocessProgress,
    report: Callable[[PreprocessProgress], None],
    start: float,
) -> None:
    """Encodes the input that isn't in the output yet, and appends it."""
    after: deque[Place] = deque()  # the position after each chunk that was read but not yet added
    chunks = inputs.chunks(partial(choose_columns, handler), output.place, after)
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
            output.note_begin(inputs.begin)
            output.add(encoded, after.popleft())
            progress.seconds = time.perf_counter() - start
            progress.done = max(progress.done, inputs.share(encoded.source, encoded.position))
            if not progress.begun and progress.before.documents:
                progress.begun = progress.done
            report(progress)
    output.note_begin(inputs.begin)


def _first_problems(encoded: Encoded, following: Iterator[Encoded]) -> list[RowProblem]:
    """Returns the bad rows of a chunk, and of a few following ones if they are few."""
    problems = list(encoded.problems)
    with contextlib.suppress(DataError):  # damage further on doesn't matter here
        for more in itertools.islice(following, _MORE_CHUNKS):
            if len(problems) >= SHOWN_PROBLEMS:
                break
            problems += more.problems
    return problems


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
    tokenizer = Tokenizer.load(config.tokenizer_path)
    encoder = Encoder(config, tokenizer)
    left, inputs = config.preview, Inputs(find_files(config.inputs), config.part_numbers)
    choose = partial(choose_columns, encoder.handler)
    for chunk in inputs.chunks(choose, Place(), deque()):
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
