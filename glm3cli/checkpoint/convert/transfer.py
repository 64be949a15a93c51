"""Brings tensors one by one from a source to the writer of a layout.

While one tensor is written, a second thread prepares the next: it reads the tensor, merges an
adapter, casts, computes the digest, and looks for values that are not finite.
"""

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glm3cli.checkpoint.adapter.pairs import Adapter
from glm3cli.checkpoint.convert.report import Report
from glm3cli.checkpoint.convert.tensor_digests import digest
from glm3cli.checkpoint.layouts.write_plan import Final, WritePlan
from glm3cli.checkpoint.layouts.writers import write
from glm3cli.checkpoint.names import Layout, Slot, Weight, slots
from glm3cli.checkpoint.scratch import Scratch
from glm3cli.checkpoint.source import StoredSource
from glm3cli.host.memory import PrivateMemory
from glm3cli.host.signals import started_pool

_log = logging.getLogger(__name__)

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
        source.cat = Scratch(2).cat  # for the tensor that is written, and the next
        self._casts = Scratch(2)
        self._report, self._handed_over = report, 0
        self._order = slots(plan.model)
        self._pool = started_pool()
        self._written: Written = _note_nothing
        self._being_written: Slot | None = None
        self._coming: tuple[Slot, Future[_Prepared]] | None = None

    def write(
        self, layout: Layout, folder: Path, final: Final, written: Written | None = None
    ) -> None:
        """Writes all tensors into `folder`, which has no files of weights.

        Args:
            layout: The layout to write.
            folder: The new folder.
            final: Called with a file and the byte before which nothing is going to change.
            written: Called with each tensor that was written.

        Raises:
            CheckpointError: The source is damaged.
            OSError, RuntimeError: The disk is full or failing.
        """
        try:
            self._written = written or _note_nothing
            self._note_written()
            self._prepare_next()
            write(layout, folder, self.plan, self._produce, final)
            assert self._coming is None, "a source tensor was not used"
            self._note_written()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _note_written(self) -> None:
        """Notes the tensors that were handed over before: the writer is done with them."""
        if self._being_written is not None:
            self._written(self._being_written)
        self._report("converting", self._handed_over, self.plan.total_bytes)

    def _produce(self, weight: Weight, layer: int | None) -> Tensor:
        """Returns the tensor that the writer asks for, and starts to prepare the next one."""
        self._note_written()
        assert self._coming is not None, "there are no more tensors"
        slot, coming = self._coming
        assert slot == (weight, layer), f"{label(slot)} was to be asked for"
        prepared = coming.result()
        self._prepare_next()
        self.digests[slot] = prepared.digest
        if prepared.non_finite:
            self.non_finite += prepared.non_finite
            kind = self.plan.model.torch_dtype
            count = prepared.non_finite
            _log.warning("%d values of %s are NaN or infinite in %s", count, label(slot), kind)
        self.memory.sample()
        self._handed_over += prepared.tensor.nbytes
        self._being_written = slot
        return prepared.tensor

    def _prepare_next(self) -> None:
        """Lets the second thread prepare the next tensor, if there is one."""
        slot = next(self._order, None)
        self._coming = None if slot is None else (slot, self._pool.submit(self._prepare, slot))

    def _prepare(self, slot: Slot) -> _Prepared:
        """Reads a tensor, merges the adapter into it, casts it, and examines the result."""
        tensor = self.adapter.merge(*slot, self.source.read(*slot))
        tensor = self._casts.cast(tensor, self.plan.dtypes[slot])
        counts: list[int] = []
        value = digest(tensor, lambda block: counts.append(_count_non_finite(block)))
        return _Prepared(tensor, value, sum(counts))


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
