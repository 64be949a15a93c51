"""The KV cache of cached decoding, and the part of it that one forward pass reads and writes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from glm3cli.device.kernels import padding_tensor


@dataclass
class CacheWindow:
    """The slots of a KV cache that one forward pass works on; shared by all layers of a model.

    A slot is the place of one token in a row of the cache. Rows are left-padded to one length, so
    that all of them end at the same slot.

    Attributes:
        padding: Number of pad slots in front of each row.
        start: First slot that this pass writes; slots before it were written by earlier passes.
    """

    padding: tuple[int, ...]
    start: int = 0

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Returns the rotary positions of this pass's `length` slots, [b or 1, length].

        A row's first token that isn't padding has position 0; pad slots get 0, too.
        """
        slots = torch.arange(self.start, self.start + length, device=device).unsqueeze(0)
        if not any(self.padding):
            return slots
        return (slots - padding_tensor(self.padding, device).unsqueeze(1)).clamp(min=0)


class KVCache:
    """Keys and values that one layer has computed so far, [b, groups, capacity, d] each.

    Attributes:
        window: The slots that the present forward pass works on.
    """

    def __init__(self, window: CacheWindow, capacity: int) -> None:
        self.window = window
        self._capacity = capacity
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores this pass's keys and values, and returns the whole cache.

        Args:
            key: The keys of the window's slots, [s, b, groups, d].
            value: The values of the same slots, [s, b, groups, d].

        Returns:
            All keys and all values, [b, groups, capacity, d] each; slots after this pass's are
            uninitialised.
        """
        if self._keys is None or self._values is None:
            shape = (key.size(1), key.size(2), self._capacity, key.size(3))
            self._keys, self._values = key.new_empty(shape), value.new_empty(shape)
        end = self.window.start + key.size(0)
        self._keys[:, :, self.window.start : end] = key.permute(1, 2, 0, 3)
        self._values[:, :, self.window.start : end] = value.permute(1, 2, 0, 3)
        return self._keys, self._values
