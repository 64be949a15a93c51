"""`ReadBack`: reads a new folder's tensors back as any model, and compares them with the source.

A tensor is read back as soon as it is written, in other threads: what was just written is still in
the page cache, and the disk is busy with writing anyway. Each must have the digest that it had when
it was handed to the writer.
"""

import threading
from collections import deque
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Self

from glm3cli.checkpoint.convert.report import Report
from glm3cli.checkpoint.convert.tensor_digests import digest
from glm3cli.checkpoint.convert.transfer import Transfer, label
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.checkpoint.names import Slot
from glm3cli.checkpoint.scratch import Scratch
from glm3cli.checkpoint.source import StoredSource
from glm3cli.errors import CheckpointError
from glm3cli.host.signals import started_pool

_THREADS = 2


class ReadBack:
    """Compares what is written with what was to be written; use it as a context manager."""

    def __init__(self, folder: Path, target: Path, transfer: Transfer) -> None:
        """Takes the new folder.

        Args:
            folder: The folder, which has its small files already.
            target: The name that it is going to have, for messages.
            transfer: What is written into it.
        """
        self._folder, self._target, self._transfer = folder, target, transfer
        self._pool = started_pool(_THREADS)
        self._lock = threading.Lock()
        self._noting = threading.Lock()
        self._reading: deque[tuple[Slot, Future[str]]] = deque()
        self._done = 0

    def note(self, slot: Slot) -> None:
        """Has a tensor that was written read back; several threads may do so at a time.

        Raises:
            CheckpointError: One of those before isn't what was to be written.
        """
        with self._noting:
            self._reading.append((slot, self._pool.submit(self._read, slot)))
            while self._reading and self._reading[0][1].done():
                self._settle()

    def finish(self, report: Report) -> None:
        """Waits until all tensors that were written are read back.

        Args:
            report: Called with the progress, as "verifying".

        Raises:
            CheckpointError: One isn't what was to be written.
        """
        total = self._transfer.plan.total_bytes
        report("verifying", self._done, total)
        while self._reading:
            self._settle()
            report("verifying", self._done, total)

    def _read(self, slot: Slot) -> str:
        """Returns the digest of a tensor as it is read back."""
        with self._lock:
            source = self._source
        return digest(source.read(*slot))

    @cached_property
    def _source(self) -> StoredSource:
        source = open_source(self._folder)
        source.cat = Scratch().cat  # a tensor isn't used any more once its digest is known
        return source

    def _settle(self) -> None:
        """Waits for the first tensor that is being read, and compares it."""
        slot, reading = self._reading.popleft()
        if reading.result() != self._transfer.digests[slot]:
            raise CheckpointError(
                f"{self._target}: {label(slot)} reads back differently",
                "the disk may be failing or full; nothing was kept",
            )
        self._transfer.memory.sample()
        self._done += self._transfer.plan.num_bytes(slot)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
