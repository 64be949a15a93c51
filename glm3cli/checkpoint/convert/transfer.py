"""Brings tensors one by one from a source to the writer of a layout.

Two threads do so side by side, each with a tensor of its own: it reads the tensor, merges an
adapter, casts, computes the digest, looks for values that are not finite, and has it written.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glm3cli.checkpoint.adapter.pairs import Adapter
from glm3cli.checkpoint.convert.report import Report
from glm3cli.checkpoint.convert.tensor_digests import digest
from glm3cli.checkpoint.layouts.write_plan import Final, WritePlan, Writer
from glm3cli.checkpoint.layouts.writers import open_writer
from glm3cli.checkpoint.names import Layout, Slot
from glm3cli.checkpoint.scratch import Scratch
from glm3cli.checkpoint.source import StoredSource
from glm3cli.host.memory import PrivateMemory
from glm3cli.host.signals import started_pool

_log = logging.getLogger(__name__)
# One writes while the other reads; of two files that are written each keeps one busy.
_THREADS = 2

# Called with a tensor that was written.
Written = Callable[[Slot], None]


@dataclass(frozen=True)
class _Prepared:
    """A canonical tensor in its new type, its digest, and its number of values that aren't finite.

    Attributes:
        tensor: The tensor, which the source's buffers may hold.
        digest: Its XXH3, in hexadecimal digits.
        non_finite: The number of its values that are NaN or infinite.
    """

    tensor: Tensor
    digest: str
    non_finite: int


class Transfer:
    """The transfer of all tensors of one conversion; `write` may be called once.

    Attributes:
        source: The weights that are converted.
        plan: The model that is written, its parallel sizes, and the type of every tensor.
        adapter: The adapter that is merged into the weights; it may be empty.
        digests: The digest of every tensor that was handed to the writer.
        non_finite: The number of values in them that are NaN or infinite.
        memory: The memory of this process, measured whenever a tensor is handed over.
    """

    def __init__(
        self, source: StoredSource, plan: WritePlan, adapter: Adapter, report: Report
    ) -> None:
        """Takes the weights and what becomes of them.

        Args:
            source: The weights that are converted.
            plan: What is written.
            adapter: The adapter to merge into the weights; it may be empty.
            report: Called with the progress, as "converting".
        """
        self.source, self.plan, self.adapter = source, plan, adapter
        self.digests: dict[Slot, str] = {}
        self.non_finite = 0
        self.memory = PrivateMemory()
        source.cat = Scratch().cat  # each thread has one buffer
        self._casts = Scratch()
        self._report, self._done = report, 0
        self._lock = threading.Lock()
        self._written: Written = _note_nothing
        self._is_over = False

    def write(
        self, layout: Layout, folder: Path, final: Final, written: Written | None = None
    ) -> None:
        """Writes all tensors into `folder`, which has no files of weights.

        Args:
            layout: The layout to write.
            folder: The new folder.
            final: Called with a file and the byte before which nothing is going to change.
            written: Called with each tensor that was written, in one of several threads.

        Raises:
            CheckpointError: The source is damaged.
            OSError, RuntimeError: The disk is full or failing.
        """
        self._written = written or _note_nothing
        self._report("converting", 0, self.plan.total_bytes)
        writer = open_writer(layout, folder, self.plan, final)
        left = iter(writer.order)
        with _single_threads(), started_pool(_THREADS) as pool:  # which waits for the threads
            try:
                working = [pool.submit(self._work, writer, left) for _ in range(_THREADS)]
                for one in wait(working, return_when=FIRST_EXCEPTION).done:
                    one.result()
            finally:
                self._is_over = True
        writer.finish()

    def _work(self, writer: Writer, left: Iterator[Slot]) -> None:
        """Brings one tensor after the other, until none is left or another thread has failed."""
        while not self._is_over:
            with self._lock:
                slot = next(left, None)
            if slot is None:
                return
            prepared = self._prepare(slot)
            self._note(slot, prepared)
            writer.fill(slot, prepared.tensor)
            self._written(slot)
            with self._lock:
                self._done += prepared.tensor.nbytes
                self._report("converting", self._done, self.plan.total_bytes)

    def _note(self, slot: Slot, prepared: _Prepared) -> None:
        """Keeps what is known of a tensor that is going to be written."""
        with self._lock:
            self.digests[slot] = prepared.digest
            self.non_finite += prepared.non_finite
            self.memory.sample()
        if prepared.non_finite:
            kind, count = self.plan.model.torch_dtype, prepared.non_finite
            _log.warning("%d values of %s are NaN or infinite in %s", count, label(slot), kind)

    def _prepare(self, slot: Slot) -> _Prepared:
        """Reads a tensor, merges the adapter into it, casts it, and examines the result."""
        tensor = self.adapter.merge(*slot, self.source.read(*slot))
        tensor = self._casts.cast(tensor, self.plan.dtypes[slot])
        counts: list[int] = []
        value = digest(tensor, lambda block: counts.append(_count_non_finite(block)))
        return _Prepared(tensor, value, sum(counts))


@contextmanager
def _single_threads() -> Iterator[None]:
    """Has torch compute with one thread in each of ours.

    OpenMP gives every thread of a program as many helpers as there are cores, which wait for more
    by spinning, and take the cores from the other threads.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _note_nothing(_slot: Slot) -> None:
    """Notes nothing of a tensor that was written."""


def _count_non_finite(block: Tensor) -> int:
    """Returns the number of values that are NaN or infinite."""
    low, high = torch.aminmax(block)  # NaN if any value is; needs no memory
    if math.isfinite(low) and math.isfinite(high):
        return 0
    return int((~torch.isfinite(block)).sum())


def label(slot: Slot) -> str:
    """Returns the name of a tensor in messages, such as `mlp_up of layer 3`."""
    return slot[0].logical + ("" if slot[1] is None else f" of layer {slot[1]}")
