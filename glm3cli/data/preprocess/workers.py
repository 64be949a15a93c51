"""Encodes chunks of rows in worker processes, in order and with bounded memory."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.preprocess.chunks import Chunk
from glm3cli.data.preprocess.counts import Counts
from glm3cli.data.preprocess.handlers import Document, Handler, Ids, build_handler
from glm3cli.data.preprocess.rows import RowError
from glm3cli.data.preprocess.sources import parse_line, rows_of
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError

# Chunks under way per worker: enough that none waits, few enough to bound the memory.
_AHEAD = 4
SHOWN_PROBLEMS = 5
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class RowProblem:
    """A row that didn't fit, and its beginning."""

    where: str
    field: str
    problem: str
    row: str

    def __str__(self) -> str:
        named = f"{self.field} " if self.field else ""
        return f"{self.where}: {named}{self.problem}"


def bad_rows_error(problems: Sequence[RowProblem]) -> DataError:
    """The error that ends a run; shows the first few of the bad rows."""
    shown = "".join(f"\n  {problem}\n    {problem.row}" for problem in problems[:SHOWN_PROBLEMS])
    return DataError(
        f"{problems[0]}; the first bad rows are:{shown}\n",
        "mend the rows, or leave such rows out with --on-error skip",
    )


@dataclass
class KeyPart:
    """What a chunk adds to one output key.

    Attributes:
        tokens: Of all sequences, int32.
        lengths: Of each sequence, int32.
        sizes: Sequences of each document.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray


class _Sequences:
    """Collects the sequences of one output key."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._sizes: list[int] = []

    def add(self, document: Sequence[Ids]) -> None:
        """Appends one document."""
        self._tokens += [np.asarray(ids, dtype=np.int32) for ids in document]
        self._sizes.append(len(document))

    def part(self) -> KeyPart:
        """All of it."""
        nothing = np.empty(0, dtype=np.int32)
        return KeyPart(
            np.concatenate([nothing, *self._tokens]),
            np.array([len(ids) for ids in self._tokens], dtype=np.int32),
            np.array(self._sizes, dtype=np.int64),
        )


@dataclass
class Encoded:
    """What a chunk became.

    Attributes:
        damage: What is wrong with the file, if the chunk or all that follows can't be read.
        counts: Of its rows, but for the bad ones, which are in `problems`.
    """

    source: str
    position: int
    keys: dict[str, KeyPart] = field(default_factory=dict)
    problems: list[RowProblem] = field(default_factory=list)
    damage: DataError | None = None
    counts: Counts = field(default_factory=Counts)


class Encoder:
    """Turns chunks of rows into tokens."""

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer) -> None:
        tokenizer.use_fast_encoder()
        self.handler: Handler = build_handler(config, tokenizer)
        self._stop = config.on_error == "stop"

    def encode(self, chunk: Chunk) -> Encoded:
        """Encodes a chunk; ends early where enough bad rows were found to end the run."""
        keys = {key: _Sequences() for key in self.handler.keys}
        encoded = Encoded(chunk.source, chunk.position)
        for index, raw in enumerate(self._read(chunk, encoded)):
            try:
                document = self.document(chunk, raw)
            except RowError as error:
                encoded.problems.append(problem_of(chunk, index, raw, error))
                if self._stop and len(encoded.problems) == SHOWN_PROBLEMS:
                    break
                continue
            if document is not None:
                encoded.counts.add(_counts_of(document))
                for key, sequences in document.sequences.items():
                    keys[key].add(sequences)
        encoded.keys = {key: sequences.part() for key, sequences in keys.items()}
        main = [part for key, part in encoded.keys.items() if key not in self.handler.side_keys]
        encoded.counts.tokens = sum(len(part.tokens) for part in main)
        return encoded

    @staticmethod
    def _read(chunk: Chunk, encoded: Encoded) -> list[Any]:
        try:
            return rows_of(chunk)
        except DataError as error:
            encoded.damage = error
            return []

    def document(self, chunk: Chunk, raw: Any) -> Document | None:
        """Encodes one row of a chunk; None for a blank line.

        Raises:
            RowError: The row isn't readable or doesn't fit.
        """
        row = _parsed(chunk, raw) if chunk.kind in ("json", "text") else raw
        if row is None and chunk.kind == "json":
            return None
        if not isinstance(row, dict):
            raise RowError("", f"expected an object with columns, got {type(row).__name__}")
        return self.handler.encode(row)


def problem_of(chunk: Chunk, index: int, raw: Any, error: RowError) -> RowProblem:
    """What is told of a bad row."""
    text = raw.decode("utf-8", "backslashreplace").strip() if isinstance(raw, bytes) else repr(raw)
    row = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
    return RowProblem(chunk.where(index), error.field, error.problem, row)


def _counts_of(document: Document) -> Counts:
    return Counts(
        documents=bool(document.sequences),
        bytes=document.text_bytes,
        empty=not document.sequences and not document.num_dropped,
        dropped=document.num_dropped,
        truncated=document.num_truncated,
    )


def _parsed(chunk: Chunk, line: bytes) -> Any:
    try:
        return parse_line("text" if chunk.kind == "text" else "json", line)
    except UnicodeDecodeError as error:
        raise RowError("", f"is not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise RowError("", f"is not valid JSON: {error}") from None


def encode_all(
    config: PreprocessConfig, tokenizer: Tokenizer, chunks: Iterator[Chunk]
) -> Generator[Encoded, None, None]:
    """Encodes chunks in order with `config.workers` processes.

    One worker, or one chunk, is done in this process.

    Raises:
        DataError: A worker process was killed.
    """
    head = [chunk for _, chunk in zip(range(2), chunks, strict=False)]
    num_workers = config.workers or len(os.sched_getaffinity(0))
    if num_workers == 1 or len(head) < 2:
        encoder = Encoder(config, tokenizer)
        for chunk in head:
            yield encoder.encode(chunk)
        yield from map(encoder.encode, chunks)
        return
    with _Workers(config, tokenizer, num_workers) as workers:
        waiting: deque[Future[Encoded]] = deque()
        for chunk in _chained(head, chunks):
            waiting.append(workers.submit(chunk))
            if len(waiting) >= _AHEAD * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _chained(head: list[Chunk], rest: Iterator[Chunk]) -> Iterator[Chunk]:
    yield from head
    yield from rest


class _Workers:
    """Processes that encode, each behind a thread that hands it one chunk at a time.

    Not concurrent.futures' process pool: in Python 3.11 it can hang when a worker is killed while
    a chunk is on its way. Here a worker that is gone is an end of file, and so is, for the
    worker, a parent that is gone.
    """

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer, num_workers: int) -> None:
        self._arguments = (config, tokenizer)
        # Started from a clean process: this one may have threads and torch in it.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["__main__", __name__])
        resource_tracker.ensure_running()  # whose start would let interrupts through
        with _interrupts_held():  # what is started so never gets any: Ctrl-C is ours to answer
            forkserver.ensure_running()
        self._lock = threading.Lock()
        self._processes: list[tuple[BaseProcess, Connection]] = []
        self._of_thread = threading.local()
        self._threads = ThreadPoolExecutor(num_workers)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *raised: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process, connection in self._processes:
            connection.close()
            process.join()

    def submit(self, chunk: Chunk) -> "Future[Encoded]":
        """Has a chunk encoded; the result raises DataError if its worker was killed."""
        return self._threads.submit(self._encode, chunk)

    def _start(self) -> None:
        with self._lock:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs, *self._arguments))
            process.start()
            theirs.close()
            self._processes.append((process, ours))
            self._of_thread.connection = ours

    def _encode(self, chunk: Chunk) -> Encoded:
        # Not as the pool's initializer: one that fails may leave shutdown waiting for ever.
        if not hasattr(self._of_thread, "connection"):
            self._start()
        try:
            self._of_thread.connection.send(chunk)
            encoded: Encoded = self._of_thread.connection.recv()
        except (EOFError, OSError):
            raise DataError(
                "a worker process was killed, most likely for want of memory",
                "use fewer --workers",
            ) from None
        return encoded


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: "Connection", config: PreprocessConfig, tokenizer: Tokenizer) -> None:
    """The life of a worker: encodes what comes until nothing can come any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # if the server of processes was there before
    encoder = Encoder(config, tokenizer)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            connection.send(encoder.encode(connection.recv()))
