"""Encodes chunks of rows in worker processes, in their order and in bounded memory."""

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
from glm3cli.data.preprocess.counts import Counts
from glm3cli.data.preprocess.document import Document, Ids
from glm3cli.data.preprocess.fields import RowError
from glm3cli.data.preprocess.handlers import Handler, build_handler
from glm3cli.data.preprocess.readers.bad_rows import BadRow, not_utf8
from glm3cli.data.preprocess.readers.chunks import Chunk, DamageError
from glm3cli.data.preprocess.readers.sources import parse_line, rows_of
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError
from glm3cli.host.limits import allow_open_files, socket_folder

# Chunks handed out per worker: enough that no worker waits, few enough to bound the memory.
_AHEAD = 4
_OPEN_FILES = 24  # of a run, without the two that each worker needs
SHOWN_PROBLEMS = 5  # how many bad rows the error that ends a run shows
_SHOWN_CHARACTERS = 100  # of each of them


@dataclass(frozen=True)
class RowProblem:
    """A bad row; a line of PREFIX.errors.jsonl has these fields.

    Attributes:
        where: The file of the row and its number.
        field: The field that is wrong, such as `messages[2].role`; "" for the whole row.
        problem: What is wrong with it and what was expected.
        row: The beginning of the row, as text.
    """

    where: str
    field: str
    problem: str
    row: str

    def __str__(self) -> str:
        named = f"{self.field} " if self.field else ""
        return f"{self.where}: {named}{self.problem}"


def bad_rows_error(problems: Sequence[RowProblem]) -> DataError:
    """Returns the error that ends a run, which shows the first few bad rows."""
    shown = "".join(f"\n  {problem}\n    {problem.row}" for problem in problems[:SHOWN_PROBLEMS])
    return DataError(
        f"{problems[0]}; the first bad rows are:{shown}\n",
        "mend the rows, or leave such rows out with --on-error skip",
    )


@dataclass
class KeyDocuments:
    """The documents that a chunk adds to one output key.

    Attributes:
        tokens: The tokens of all sequences, one after the other, int32 [number of tokens].
        lengths: The number of tokens of each sequence, int32 [number of sequences].
        sizes: The number of sequences of each document, int64 [number of documents].
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray


class _Collector:
    """Collects the documents of one output key."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._sizes: list[int] = []

    def add(self, document: Sequence[Ids]) -> None:
        """Appends one document, given as its sequences of token ids."""
        self._tokens += [np.asarray(ids, dtype=np.int32) for ids in document]
        self._sizes.append(len(document))

    def collected(self) -> KeyDocuments:
        """Returns all documents that were added."""
        nothing = np.empty(0, dtype=np.int32)
        return KeyDocuments(
            np.concatenate([nothing, *self._tokens]),
            np.array([len(ids) for ids in self._tokens], dtype=np.int32),
            np.array(self._sizes, dtype=np.int64),
        )


@dataclass
class Encoded:
    """The documents of a chunk, and what was wrong with it.

    Attributes:
        source: The path of the file that the chunk is from.
        position: How many bytes of the file were read up to the end of the chunk.
        keys: The documents by output key.
        problems: The bad rows of the chunk.
        damage: What is wrong with the file if the chunk, or what follows it, can't be read.
        counts: The counts of the chunk's rows, without the bad rows.
    """

    source: str
    position: int
    keys: dict[str, KeyDocuments] = field(default_factory=dict)
    problems: list[RowProblem] = field(default_factory=list)
    damage: DamageError | None = None
    counts: Counts = field(default_factory=Counts)


class Encoder:
    """Turns chunks of rows into tokens, within one process.

    Attributes:
        handler: The handler that encodes the rows.
    """

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer) -> None:
        tokenizer.use_fast_encoder()
        self.handler: Handler = build_handler(config, tokenizer)
        self._stop = config.on_error == "stop"

    def encode(self, chunk: Chunk) -> Encoded:
        """Encodes a chunk.

        If bad rows end the run, it stops at the last bad row that the error will show.
        """
        keys = {key: _Collector() for key in self.handler.keys}
        encoded = Encoded(chunk.source, chunk.position)
        for index, row in enumerate(self._read(chunk, encoded)):
            try:
                document = self.document(chunk, row)
            except RowError as error:
                encoded.problems.append(problem_of(chunk, index, row, error))
                if self._stop and len(encoded.problems) == SHOWN_PROBLEMS:
                    break
                continue
            if document is not None:
                encoded.counts.add(_counts_of(document))
                for key, sequences in document.sequences.items():
                    keys[key].add(sequences)
        encoded.keys = {key: collector.collected() for key, collector in keys.items()}
        encoded.counts.tokens = sum(
            len(documents.tokens)
            for key, documents in encoded.keys.items()
            if key not in self.handler.side_keys
        )
        return encoded

    @staticmethod
    def _read(chunk: Chunk, encoded: Encoded) -> list[Any]:
        """Returns the rows of a chunk; none, and the damage in `encoded`, if it can't be read."""
        try:
            return rows_of(chunk)
        except DamageError as error:
            encoded.damage = error
            return []

    def document(self, chunk: Chunk, row: Any) -> Document | None:
        """Encodes one row of a chunk.

        Args:
            chunk: The chunk.
            row: The row as it is in `chunk.rows`: a line, as bytes, or a parsed row.

        Returns:
            The document, or None for a blank line.

        Raises:
            RowError: The row can't be parsed or isn't of the form that the handler expects.
        """
        if isinstance(row, BadRow):
            raise RowError(row.field, row.problem)
        parsed = _parsed(chunk, row) if chunk.kind in ("json", "text") else row
        if parsed is None and chunk.kind == "json":
            return None
        if not isinstance(parsed, dict):
            raise RowError("", f"expected an object with columns, got {type(parsed).__name__}")
        return self.handler.encode(parsed)


def problem_of(chunk: Chunk, index: int, row: Any, error: RowError) -> RowProblem:
    """Describes a bad row.

    Args:
        chunk: The chunk of the row.
        index: The place of the row in the chunk, from 0.
        row: The row as it is in `chunk.rows`: a line, as bytes, or a parsed row.
        error: What is wrong with the row.
    """
    where = chunk.where(index)
    if isinstance(row, BadRow):
        text, where = row.text, f"{chunk.source}:{row.line}" if row.line else where
    else:
        text = (
            row.decode("utf-8", "backslashreplace").strip() if isinstance(row, bytes) else repr(row)
        )
    start = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
    return RowProblem(where, *map(_printable, (error.field, error.problem, start)))


def _printable(text: str) -> str:
    """Writes half surrogate pairs, which JSON may hold but UTF-8 can't, as their escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _counts_of(document: Document) -> Counts:
    """Returns the counts of one row, without its tokens."""
    return Counts(
        documents=bool(document.sequences),
        bytes=document.text_bytes,
        empty=not (document.sequences or document.num_dropped or document.num_equal),
        dropped=document.num_dropped,
        equal=document.num_equal,
        truncated=document.num_truncated,
    )


def _parsed(chunk: Chunk, line: bytes) -> Any:
    """Parses a line of a chunk of lines; raises RowError if it can't."""
    try:
        return parse_line("text" if chunk.kind == "text" else "json", line)
    except UnicodeDecodeError:
        raise RowError("", not_utf8(line)) from None
    except ValueError as error:
        raise RowError("", str(error)) from None


def encode_all(
    config: PreprocessConfig, tokenizer: Tokenizer, chunks: Iterator[Chunk]
) -> Generator[Encoded, None, None]:
    """Encodes chunks with `config.workers` processes and yields the results in the chunks' order.

    With one worker, or for a single chunk, this process does it itself.

    Args:
        config: The options of the run.
        tokenizer: The tokenizer.
        chunks: The chunks, which are read as the workers need them.

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
    """Worker processes; each has a thread in this process that hands it one chunk at a time.

    It doesn't use concurrent.futures' process pool, which in Python 3.11 can hang when a worker is
    killed while a chunk is sent to it. Here this process sees the end of the worker as the end of
    their pipe, and so does the worker if this process ends.
    """

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer, num_workers: int) -> None:
        self._arguments = (config, tokenizer)
        # The workers are forked from a clean process, since this one may have threads and torch.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["__main__", __name__])
        allow_open_files(_OPEN_FILES + 2 * num_workers)
        socket_folder()  # before the server makes its socket
        resource_tracker.ensure_running()  # before, since its start unblocks interrupts
        # Processes that start while interrupts are blocked never get any: only this process
        # answers Ctrl-C.
        with _interrupts_blocked():
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
        """Gives a chunk to a worker; the future raises DataError if the worker is killed."""
        return self._threads.submit(self._encode, chunk)

    def _start(self) -> None:
        """Starts the worker process of the calling thread."""
        with self._lock:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs, *self._arguments))
            process.start()
            theirs.close()
            self._processes.append((process, ours))
            self._of_thread.process, self._of_thread.connection = process, ours

    def _encode(self, chunk: Chunk) -> Encoded:
        """Sends a chunk to the worker of the calling thread and waits for the result.

        Raises:
            DataError: The worker has ended.
        """
        # Not as the pool's initializer: if that fails, shutdown may wait forever.
        if not hasattr(self._of_thread, "connection"):
            self._start()
        try:
            self._of_thread.connection.send(chunk)
            encoded: Encoded = self._of_thread.connection.recv()
        except (EOFError, OSError):
            raise _ended(self._of_thread.process) from None
        return encoded


def _ended(process: BaseProcess) -> DataError:
    """Returns the error of a worker that has ended although its pipe was open.

    One whose program fails has written a traceback before it ends, with a code above 0.
    """
    process.join()
    code = process.exitcode or 0
    if code > 0:
        return DataError(f"a worker process ended with {code}", "see what it wrote above")
    return DataError(
        "a worker process was killed, most likely for want of memory", "use fewer --workers"
    )


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Blocks SIGINT in this thread, and so in the processes that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: "Connection", config: PreprocessConfig, tokenizer: Tokenizer) -> None:
    """Runs in a worker process: encodes the chunks that arrive until the pipe is closed."""
    # The fork server may have been started before, by code that doesn't block interrupts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    encoder = Encoder(config, tokenizer)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            connection.send(encoder.encode(connection.recv()))
