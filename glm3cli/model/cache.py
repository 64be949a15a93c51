"""The KV cache of inference: keys and values of the tokens that a model has read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Tokens that stand one after the other in a row of the KV cache.

    Attributes:
        row: The row.
        start: The slot of the first token, which is its position, too.
        tokens: The token ids; at least one.
        adapter: The name of the adapter that they are computed with; None for the bare model.
    """

    row: int
    start: int
    tokens: Sequence[int]
    adapter: str | None = None

    @property
    def end(self) -> int:
        """The slot after the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Step:
    """One token in each of the first rows of a KV cache, as tensors alone.

    Nothing on the host changes from one step of these sizes to the next, so that a device can
    capture the pass over it.

    Attributes:
        tokens: The token ids, [n].
        slots: The slot of each token, which is its position, too, [n].
        rows: The row that gets its key and value, [n]: its own, or a spare one of the cache for a
            token that stands in a row which takes no part.
        length: The most slots of a row that are seen.
    """

    tokens: Tensor
    slots: Tensor
    rows: Tensor
    length: int


class KVCache:
    """Keys and values of this rank's layers, in rows of slots: a slot holds one token of a row.

    A row belongs to one text and is as long as any other, whatever its text needs. ChatGLM3's two
    groups take 28 KiB a token in 16 bits, where a model without groups takes 512: a thousand rows
    of a thousand slots fit into half of a 64 GB card. Pages, which save what rows waste, aren't
    needed, and a row can be passed to any attention kernel as it is. Its length is one of a few
    (`bucket`), so that shapes seldom change.

    Attributes:
        slots: The keys and the values, [layers, 2, rows, groups, capacity, d].
        num_spare: The number of rows at the end that take what belongs to no text.
    """

    def __init__(
        self,
        num_layers: int,
        groups: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        num_spare: int = 0,
    ) -> None:
        """Makes a cache without rows, but for spare ones.

        Args:
            num_layers: The number of this rank's layers.
            groups: The number of key and value heads on this rank.
            width: The size of a head.
            dtype: The type of keys and values.
            device: The device that holds them.
            num_spare: The number of rows that take what belongs to no text.
        """
        self.num_spare = num_spare
        shape = (num_layers, 2, num_spare, groups, 0, width)
        self.slots = torch.empty(shape, dtype=dtype, device=device)

    @property
    def num_rows(self) -> int:
        """The number of rows, without the spare ones that come after them."""
        return self.slots.size(2) - self.num_spare

    @property
    def capacity(self) -> int:
        """The number of slots in a row."""
        return self.slots.size(4)

    def grow(self, num_rows: int, capacity: int) -> None:
        """Makes room for at least so many rows of at least so many slots; what is there stays."""
        rows, slots = self.num_rows, self.capacity
        num_rows, capacity = max(num_rows, rows), max(capacity, slots)
        if (num_rows, capacity) == (rows, slots):
            return
        layers, two, _, groups, _, width = self.slots.shape
        # Zeros: what isn't written yet is hidden by a mask, which NaN would pass through.
        whole = num_rows + self.num_spare
        grown = self.slots.new_zeros(layers, two, whole, groups, capacity, width)
        grown[:, :, :rows, :, :slots] = self.slots[:, :, :rows]
        self.slots = grown

    def copy(self, source: "KVCache", from_row: int, to_row: int, start: int, end: int) -> None:
        """Copies the slots `start` to `end` of a row of a cache, maybe this one, to a row here."""
        self.slots[:, :, to_row, :, start:end] = source.slots[:, :, from_row, :, start:end]

    def clear(self, row: int) -> None:
        """Overwrites a row with zeros."""
        self.slots[:, :, row] = 0

    def write_one(self, layer: int, rows: Tensor, slots: Tensor, new: Tensor) -> None:
        """Stores the keys and values of one token in each of some rows.

        Args:
            layer: The index of the layer among this rank's.
            rows: The rows, [n].
            slots: The slot of each token, [n].
            new: The keys and values, [n, groups, 2, d].
        """
        self.slots[layer, :, rows, :, slots] = new.transpose(1, 2)

    def write_chunk(self, layer: int, row: int, start: int, new: Tensor) -> None:
        """Stores the keys and values of a row's tokens, [n, groups, 2, d], from a slot on."""
        self.slots[layer, :, row, :, start : start + len(new)] = new.permute(2, 1, 0, 3)


def bucket(count: int, smallest: int = 1) -> int:
    """Returns the length of which rows are made to hold `count`: `smallest` x a power of two."""
    size = smallest
    while size < count:
        size *= 2
    return size
