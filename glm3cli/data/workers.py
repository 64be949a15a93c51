"""Encodes chunks of rows in worker processes, in order and with bounded memory."""

import contextlib
import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.handlers import Document, Handler, build_handler
from glm3cli.data.rows import RowError
from glm3cli.data.sources import Chunk, parse_line
from glm3cli.data.tokenizer import Tokenizer
from glm3cli.errors import DataError

# Chunks under way per worker: enough that none waits, few enough to bound the memory.
_AHEAD = 4


@dataclass(frozen=True)
class Problem:
    """A row that didn't fit."""

    where: str
    field: str
    problem: str

    def error(self) -> DataError:
        """The error that ends the run."""
        named = f"{self.field} " if self.field else ""
        return DataError(
            f"{self.where}: {named}{self.problem}",
            "mend the row, or leave such rows out with --on-error skip",
        )


@dataclass
class Sequences:
    """What one output key gets: tokens (int32), their lengths, and sequences per document."""

    tokens: bytearray = field(default_factory=bytearray)
    lengths: array = field(default_factory=lambda: array("i"))
    sizes: array = field(default_factory=lambda: array("i"))

    def add(self, document: list[list[int]]) -> None:
        """Appends one document."""
        for ids in document:
            self.tokens += np.array(ids, dtype=np.int32).tobytes()
            self.lengths.append(len(ids))
        self.sizes.append(len(document))


@dataclass
class Encoded:
    """What a chunk became."""

    source: str
    position: int
    keys: dict[str, Sequences]
    problems: list[Problem] = field(default_factory=list)
    num_documents: int = 0
    num_tokens: int = 0
    num_dropped: int = 0
    text_bytes: int = 0


class Encoder:
    """Turns chunks of rows into tokens."""

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer) -> None:
        tokenizer.remember_words()
        self.handler: Handler = build_handler(config, tokenizer)
        self._stop = config.on_error == "stop"

    def encode(self, chunk: Chunk) -> Encoded:
        """Encodes a chunk; ends at its first bad row where that ends the run anyway."""
        keys = {key: Sequences() for key in self.handler.keys}
        encoded = Encoded(chunk.source, chunk.position, keys)
        for index, raw in enumerate(chunk.rows):
            try:
                document = self.document(chunk, raw)
            except RowError as error:
                problem = Problem(chunk.where(index), error.field, error.problem)
                encoded.problems.append(problem)
                if self._stop:
                    break
                continue
            if document is not None:
                self._add(encoded, document)
        return encoded

    def document(self, chunk: Chunk, raw: Any) -> Document | None:
        """Encodes one row of a chunk; None for a blank line.

        Raises:
            RowError: The row isn't readable or doesn't fit.
        """
        row = raw if chunk.kind == "row" else _parsed(chunk, raw)
        if row is None and chunk.kind == "json":
            return None
        if not isinstance(row, dict):
            raise RowError("", f"expected an object with columns, got {type(row).__name__}")
        return self.handler.encode(row)

    def _add(self, encoded: Encoded, document: Document) -> None:
        encoded.num_documents += bool(document.sequences)
        encoded.num_dropped += document.num_dropped
        encoded.text_bytes += document.text_bytes
        for key, sequences in document.sequences.items():
            encoded.keys[key].add(sequences)
            if key not in ("attention_mask", "labels") or not self.handler.marker:
                encoded.num_tokens += sum(map(len, sequences))


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
        self._lock = threading.Lock()
        self._processes: list[tuple[BaseProcess, Connection]] = []
        self._of_thread = threading.local()
        self._threads = ThreadPoolExecutor(num_workers, initializer=self._start)

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
        try:
            self._of_thread.connection.send(chunk)
            encoded: Encoded = self._of_thread.connection.recv()
        except (EOFError, OSError):
            raise DataError(
                "a worker process was killed, most likely for want of memory",
                "use fewer --workers",
            ) from None
        return encoded


def _work(connection: "Connection", config: PreprocessConfig, tokenizer: Tokenizer) -> None:
    """The life of a worker: encodes what comes until nothing can come any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    encoder = Encoder(config, tokenizer)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            connection.send(encoder.encode(connection.recv()))
