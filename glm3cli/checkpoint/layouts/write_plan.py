"""All that the writers have in common.

`WritePlan` holds the model that is written, its parallel sizes, and the types; a `Writer` takes the
tensors; a `Final` function is called as the files grow, whose `Front` moves.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from glm3cli.checkpoint.names import Slot
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ModelParallelConfig

# Called again and again with a file and a place in it: the bytes before have their final values.
Final = Callable[[Path, int], None]


@dataclass(frozen=True)
class WritePlan:
    """What is to be written.

    Attributes:
        model: The model's shape; its type is that of most weights.
        parallel: The parallel sizes that per-rank files are cut for.
        dtypes: The type of every weight.
        shard_bytes: The largest number of bytes of tensors in one file of a Hugging Face folder.
    """

    model: ModelConfig
    parallel: ModelParallelConfig
    dtypes: Mapping[Slot, torch.dtype]
    shard_bytes: int

    def num_bytes(self, slot: Slot) -> int:
        """Returns the size of one whole weight, in bytes."""
        return torch.Size(slot[0].shape(self.model)).numel() * self.dtypes[slot].itemsize

    @property
    def total_bytes(self) -> int:
        """The size of all weights, in bytes."""
        return sum(self.num_bytes(slot) for slot in self.dtypes)

    @property
    def main_dtype(self) -> torch.dtype:
        """The type that most weights have."""
        return max(self.dtypes.values(), key=list(self.dtypes.values()).count)


class Writer(ABC):
    """Fills the weights into a new folder, tensor by tensor.

    Once the writer is there, the folder can be opened as a model: values that aren't written yet
    are missing, and nothing else.

    Attributes:
        order: The weights, in the order in which they should be filled in.
    """

    order: Sequence[Slot]

    @abstractmethod
    def fill(self, slot: Slot, tensor: Tensor) -> None:
        """Writes one weight; several threads may do so at a time.

        Args:
            slot: The weight and the layer.
            tensor: The canonical tensor, in its new type.

        Raises:
            OSError: The disk is full or failing.
        """

    @abstractmethod
    def finish(self) -> None:
        """Completes the files, when all weights are filled in.

        Raises:
            OSError: The disk is full or failing.
        """


class Front:
    """Tells of a file the byte before which nothing is going to change; threads may share it."""

    def __init__(self, path: Path, begins: Sequence[int], end: int, final: Final) -> None:
        """Takes a file of which no part is written.

        Args:
            path: The file.
            begins: The first byte of each part, in their order.
            end: The byte behind the last part.
            final: Called with the file and the byte, whenever it has moved.
        """
        self._path, self._end, self._final = path, end, final
        self._missing = dict(enumerate(begins))
        self._lock = threading.Lock()

    def advance(self, number: int, place: int) -> None:
        """Takes note that the bytes of a part, counted from 0, are written up to a place."""
        with self._lock:
            if number == next(iter(self._missing)):
                self._final(self._path, place)

    def complete(self, number: int) -> None:
        """Takes note that a part is written, and won't change."""
        with self._lock:
            is_first = number == next(iter(self._missing))
            del self._missing[number]
            if is_first:  # those behind another that is being written move nothing
                self._final(self._path, next(iter(self._missing.values()), self._end))


def alternating(files: Sequence[Sequence[Slot]], plan: WritePlan) -> list[Slot]:
    """Returns the weights of files in an order in which two threads seldom meet in one of them.

    Linux lets one thread at a time write to a file, and takes longer for that than the disk does.
    The files are parted into up to three groups, of which none has much more than a half of the
    bytes, and all of these are gone through at once, as fast as they end together.

    Args:
        files: The weights in each file, or in each set of files of the same weights.
        plan: The sizes of the weights.
    """
    sizes = [sum(map(plan.num_bytes, file)) for file in files]
    ends = list(accumulate(sizes))
    groups: list[list[Slot]] = [[], [], []]
    for file, size, end in zip(files, sizes, ends, strict=True):
        groups[int(3 * (end - size / 2) / ends[-1])].extend(file)
    shares: list[tuple[float, Slot]] = []
    for group in groups:
        *begins, whole = accumulate(map(plan.num_bytes, group), initial=0)
        shares += [(begin / whole, slot) for begin, slot in zip(begins, group, strict=True)]
    return [slot for _, slot in sorted(shares, key=lambda one: one[0])]
