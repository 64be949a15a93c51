"""The KV cache of inference: keys and values of the tokens that a model has read."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of this rank's layers, in rows of slots: a slot holds one token of a row.

    A row belongs to one text and is as long as any other, whatever its text needs. ChatGLM3's two
    groups take 28 KiB a token in 16 bits, where a model without groups takes 512: a thousand rows
    of a thousand slots fit into half of a 64 GB card. Pages, which save what rows waste, aren't
    needed, and a row can be passed to any attention kernel as it is. Its length is one of a few
    (`bucket`), so that shapes seldom change.

    Attributes:
        slots: The keys and the values, [layers, 2, rows, groups, capacity, d].
    """

    def __init__(
        self, num_layers: int, groups: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Makes a cache without rows.

        Args:
            num_layers: The number of this rank's layers.
            groups: The number of key and value heads on this rank.
            width: The size of a head.
            dtype: The type of keys and values.
            device: The device that holds them.
        """
        shape = (num_layers, 2, 0, groups, 0, width)
        self.slots = torch.empty(shape, dtype=dtype, device=device)

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return self.slots.size(2)

    @property
    def capacity(self) -> int:
        """The number of slots in a row."""
        return self.slots.size(4)

    def grow(self, num_rows: int, capacity: int) -> None:
        """Makes room for at least so many rows of at least so many slots; what is there stays."""
        num_rows, capacity = max(num_rows, self.num_rows), max(capacity, self.capacity)
        if (num_rows, capacity) == (self.num_rows, self.capacity):
            return
        layers, two, rows, groups, slots, width = self.slots.shape
        # Zeros: what isn't written yet is hidden by a mask, which NaN would pass through.
        grown = self.slots.new_zeros(layers, two, num_rows, groups, capacity, width)
        grown[:, :, :rows, :, :slots] = self.slots
        self.slots = grown

    def copy(self, source: "KVCache", from_row: int, to_row: int, start: int, end: int) -> None:
        """Copies the slots `start` to `end` of a row of a cache, maybe this one, to a row here."""
        self.slots[:, :, to_row, :, start:end] = source.slots[:, :, from_row, :, start:end]

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
