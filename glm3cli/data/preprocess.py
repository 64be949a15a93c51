"""`preprocess`: reads raw data, tokenizes it, and writes what training reads."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TextIO

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.handlers import Handler, build_handler, choose_columns
from glm3cli.data.indexed import IndexedWriter, aside, publish
from glm3cli.data.rows import RowError
from glm3cli.data.sources import Chunk, find_files, read_chunks
from glm3cli.data.tokenizer import Tokenizer
from glm3cli.data.workers import Encoded, Encoder, Problem, encode_all
from glm3cli.errors import DataError, StoppedError


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        documents: Rows that became a document.
        tokens: Tokens written, labels and masks not counted.
        bytes: Text encoded, as UTF-8.
        skipped: Bad rows left out, and samples of which --seq-length left no answer.
        done: Share of the input that was read, 0 to 1.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    skipped: int = 0
    seconds: float = 0.0
    done: float = 0.0

    def add(self, encoded: Encoded) -> None:
        """Counts a chunk."""
        self.documents += encoded.num_documents
        self.tokens += encoded.num_tokens
        self.bytes += encoded.text_bytes
        self.skipped += len(encoded.problems) + encoded.num_dropped


@dataclass(frozen=True)
class Summary:
    """The result of a run; `seconds` is its wall time, `files` what it wrote."""

    documents: int
    tokens: int
    bytes: int
    seconds: float
    skipped: int
    files: list[str] = field(default_factory=list)


def preprocess(
    config: PreprocessConfig, report: Callable[[Progress], None] = lambda progress: None
) -> Summary:
    """Turns the inputs into token files.

    Args:
        config: What to do.
        report: Called after every chunk.

    Raises:
        DataError: The input is missing or bad, or the output can't be written.
        StoppedError: SIGTERM came; nothing is left behind.
    """
    start = time.perf_counter()
    tokenizer = Tokenizer.load(config.tokenizer)
    handler = build_handler(config, tokenizer)
    files = find_files(config.inputs)
    progress = Progress()
    with _stoppable(), _Output(config, handler) as output:
        sizes = _Sizes(files)
        chunks = _read(files, handler)
        with contextlib.closing(encode_all(config, tokenizer, chunks)) as encoded_chunks:
            for encoded in encoded_chunks:
                if encoded.problems and config.on_error == "stop":
                    raise encoded.problems[0].error()
                output.add(encoded)
                progress.add(encoded)
                progress.seconds = time.perf_counter() - start
                progress.done = max(progress.done, sizes.share(encoded))
                report(progress)
        if not progress.documents:
            raise DataError(
                f"the input has no document to write ({progress.skipped} rows skipped)",
                "check --input, --handler and --seq-length",
            )
        written = output.publish()
    counts = asdict(progress)
    del counts["done"]
    counts["seconds"] = time.perf_counter() - start
    return Summary(**counts, files=[str(path) for path in written])


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
    for chunk in _read(find_files(config.inputs), encoder.handler):
        for index, raw in enumerate(chunk.rows):
            try:
                document = encoder.document(chunk, raw)
            except RowError as error:
                raise Problem(chunk.where(index), error.field, error.problem).error() from None
            sequences = document.sequences if document else {}
            ids = sequences.get("input_ids") if encoder.handler.marker else None
            labels = sequences.get("labels") if encoder.handler.marker else None
            for i, sequence in enumerate(ids or [s for key in sequences.values() for s in key]):
                if not left:
                    return
                trained: list[int] | list[None] = labels[i] if labels else [None] * len(sequence)
                names = [tokenizer.token_name(token) for token in sequence]
                yield Shown(chunk.where(index), list(zip(names, sequence, trained, strict=True)))
                left -= 1


def _read(files: list[Path], handler: Handler) -> Iterator[Chunk]:
    for path in files:
        yield from read_chunks(path, partial(choose_columns, handler))


class _Sizes:
    """Tells from a file and a position in it how much of all input was read."""

    def __init__(self, files: list[Path]) -> None:
        self._before: dict[str, int] = {}
        self._total = 0
        for path in files:
            self._before.setdefault(str(path), self._total)
            self._total += path.stat().st_size

    def share(self, encoded: Encoded) -> float:
        return (self._before[encoded.source] + encoded.position) / max(self._total, 1)


class _Output:
    """All files of a run, under hidden names until they are complete."""

    def __init__(self, config: PreprocessConfig, handler: Handler) -> None:
        prefix = config.output_prefix
        self._names = {
            key: prefix.with_name(f"{prefix.name}{handler.marker}_{key}_document")
            for key in handler.keys
        }
        self._writers: dict[str, IndexedWriter] = {}
        self._errors_path = prefix.with_name(f"{prefix.name}.errors.jsonl")
        self._errors: TextIO | None = None

    def __enter__(self) -> "_Output":
        with self._disk_errors_named():
            try:
                self._errors_path.parent.mkdir(parents=True, exist_ok=True)
                for key, name in self._names.items():
                    self._writers[key] = IndexedWriter(name)
            except BaseException:
                self._discard()
                raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._discard()

    def add(self, encoded: Encoded) -> None:
        """Appends what a chunk became."""
        with self._disk_errors_named():
            for key, sequences in encoded.keys.items():
                self._writers[key].add(sequences.tokens, sequences.lengths, sequences.sizes)
            for problem in encoded.problems:
                if self._errors is None:
                    self._errors = aside(self._errors_path).open("w", encoding="utf-8")
                self._errors.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")

    def publish(self) -> list[Path]:
        """Gives all files their names."""
        with self._disk_errors_named():
            for writer in self._writers.values():
                writer.finish()
            if self._errors is not None:
                self._errors.close()
                aside(self._errors_path).replace(self._errors_path)
            else:
                self._errors_path.unlink(missing_ok=True)  # of an earlier run
            return publish(list(self._writers.values()))

    def _discard(self) -> None:
        """Removes what has only a hidden name."""
        for writer in self._writers.values():
            writer.discard()
        if self._errors is not None:
            self._errors.close()
            aside(self._errors_path).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _disk_errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            folder = self._errors_path.parent
            raise DataError(
                f"can't write {error.filename or folder}: {error.strerror}",
                "choose another --output-prefix, or make room there",
            ) from None


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Lets SIGTERM end the run like an error, so that it cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError("preprocess was stopped by SIGTERM", "nothing was written; run it again")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
