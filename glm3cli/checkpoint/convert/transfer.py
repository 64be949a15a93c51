"""The tensors on their way from one layout to another.

While one tensor is written, a second thread prepares the next: reads it, merges an adapter, casts,
hashes, and looks for values that are not finite.
"""

import logging
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glm3cli.checkpoint.adapter.reader import Adapter
from glm3cli.checkpoint.convert.progress import Progress
from glm3cli.checkpoint.convert.tensor_digests import digest
from glm3cli.checkpoint.layouts.write_plan import Final, WritePlan
from glm3cli.checkpoint.layouts.writers import write
from glm3cli.checkpoint.names import Layout, Slot, Weight, slots
from glm3cli.checkpoint.scratch import Scratch
from glm3cli.checkpoint.source import StoredSource
from glm3cli.host.memory import PrivateMemory
from glm3cli.host.signals import started_pool

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Prepared:
    """A canonical tensor in the type of the target, and what is noted about it."""

    tensor: Tensor
    digest: str
    non_finite: int


class Transfer:
    """Brings all tensors from a source to a writer.

    Attributes:
        source: Where they come from.
        plan: What they become.
        adapter: What is merged into them.
        digests: The digest of every tensor that was made.
        non_finite: Number of values that are NaN or infinite.
        memory: The memory of this process, asked whenever a tensor is handed over.
    """

    def __init__(self, source: StoredSource, plan: WritePlan, adapter: Adapter) -> None:
        self.source, self.plan, self.adapter = source, plan, adapter
        self.digests: dict[Slot, str] = {}
        self.non_finite = 0
        self.memory = PrivateMemory()
        source.cat = Scratch(2).cat  # for the tensor that is written, and the next
        self._progress = Progress(plan.total_bytes, "converting")
        self._order = slots(plan.model.num_layers)
        self._pool = started_pool()
        self._coming: tuple[Slot, Future[_Prepared]] | None = None

    def write(self, layout: Layout, folder: Path, final: Final) -> None:
        """Writes all tensors into the empty `folder`; see `writers`."""
        try:
            with self._progress:
                self._prepare_next()
                write(layout, folder, self.plan, self._produce, final)
            assert self._coming is None, "a source tensor was not used"
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _produce(self, weight: Weight, layer: int | None) -> Tensor:
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
        self._progress.advance(prepared.tensor.nbytes)
        return prepared.tensor

    def _prepare_next(self) -> None:
        slot = next(self._order, None)
        self._coming = None if slot is None else (slot, self._pool.submit(self._prepare, slot))

    def _prepare(self, slot: Slot) -> _Prepared:
        tensor = self.adapter.merge(*slot, self.source.read(*slot))
        tensor = tensor.to(self.plan.dtypes[slot])
        return _Prepared(tensor, digest(tensor), _count_non_finite(tensor))


def _count_non_finite(tensor: Tensor) -> int:
    low, high = torch.aminmax(tensor)  # NaN if any value is; needs no memory
    if torch.isfinite(low) and torch.isfinite(high):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def label(slot: Slot) -> str:
    """What messages call a tensor."""
    return slot[0].logical + ("" if slot[1] is None else f" of layer {slot[1]}")
