"""Which slots of a KV cache a pass of decoding looks at."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class CacheWindow:
    """What one forward pass of cached decoding looks at; shared by all layers of a model.

    Rows are left-padded to one length, so that all of them end at the same slot.

    Attributes:
        padding: Number of pad slots in front of each row.
        start: First slot that this pass writes.
    """

    padding: tuple[int, ...]
    start: int = 0

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Rotary positions of the slots of this pass, [b or 1, length]; pad slots get 0."""
        slots = torch.arange(self.start, self.start + length, device=device).unsqueeze(0)
        if not any(self.padding):
            return slots
        return (slots - _on_device(self.padding, device).unsqueeze(1)).clamp(min=0)

    def mask(self, length: int, device: torch.device) -> Tensor | None:
        """What each query sees, [b or 1, 1, length, start + length]; None if plain causal."""
        if not any(self.padding) and (self.start == 0 or length == 1):
            return None
        keys = torch.arange(self.start + length, device=device)
        queries = keys[self.start :].unsqueeze(1)  # [length, 1]
        seen = keys <= queries
        if not any(self.padding):
            return seen[None, None]
        real = keys >= _on_device(self.padding, device)[:, None, None]  # [b, 1, keys]
        # A pad slot sees itself: a row of the softmax without any key would be NaN.
        return ((seen & real) | (keys == queries)).unsqueeze(1)


@functools.lru_cache(maxsize=8)
def _on_device(padding: tuple[int, ...], device: torch.device) -> Tensor:
    """The paddings as a tensor; copied once for all layers and tokens."""
    return torch.tensor(padding, device=device)
