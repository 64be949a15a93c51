"""Core attention on scaled_dot_product_attention, with an optional KV cache for decoding."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from glm3cli.device import require_active
from glm3cli.model.context import to_heads, to_positions
from glm3cli.model.rotary import Rotation, rotate, rotation_at, rotation_of_sequence


@dataclass
class Window:
    """What one forward pass of cached decoding looks at; shared by all layers of a model.

    Rows are left-padded to one length, so that all of them end at the same slot.

    Attributes:
        start: First slot that this pass writes.
        padding: Number of pad slots in front of each row, [b]; None where no row has any.
    """

    start: int = 0
    padding: Tensor | None = None

    def positions(self, length: int) -> Tensor:
        """Rotary positions of the slots of this pass, [b or 1, length]; pad slots get 0."""
        device = require_active().torch_device()
        slots = torch.arange(self.start, self.start + length, device=device).unsqueeze(0)
        return slots if self.padding is None else (slots - self.padding.unsqueeze(1)).clamp(min=0)

    def mask(self, length: int) -> Tensor | None:
        """What each query sees, [b or 1, 1, length, start + length]; None if plain causal."""
        if self.padding is None and (self.start == 0 or length == 1):
            return None
        keys = torch.arange(self.start + length, device=require_active().torch_device())
        queries = keys[self.start :].unsqueeze(1)  # [length, 1]
        seen = keys <= queries
        if self.padding is None:
            return seen[None, None]
        real = keys >= self.padding[:, None, None]  # [b, 1, keys]
        # A pad slot sees itself: a row of the softmax without any key would be NaN.
        return ((seen & real) | (keys == queries)).unsqueeze(1)


class KVCache:
    """Keys and values of one layer for all slots so far, [b, groups, slots, d] each."""

    def __init__(self, window: Window, capacity: int) -> None:
        self.window = window
        self._capacity = capacity
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the keys and values of this pass and gives those of all slots so far."""
        if self._keys is None or self._values is None:
            shape = (keys.size(0), keys.size(1), self._capacity, keys.size(3))
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        end = self.window.start + keys.size(2)
        self._keys[:, :, self.window.start : end] = keys
        self._values[:, :, self.window.start : end] = values
        return self._keys[:, :, :end], self._values[:, :, :end]


class CoreAttention(torch.nn.Module):
    """Causal attention over grouped queries; K and V are not expanded to the number of heads.

    `cache` is set by the inference engine; it is None in training.
    """

    def __init__(
        self, config: Any, layer_number: int, rotary_base: float, **_megatron: Any
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.scale = config.kv_channels**-0.5
        self.cache: KVCache | None = None
        self._rotary_base = rotary_base
        is_shared = config.context_parallel_size > 1
        self._sharers = parallel_state.get_context_parallel_group() if is_shared else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **_megatron: Any,
    ) -> Tensor:
        """Attends: query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d].

        With context parallelism, s are this rank's positions.
        `attention_mask` holds the number of each position's sample, [b, whole s], where a sequence
        is a pack of several; each sees itself only.
        """
        if self._sharers is not None:
            query, key, value = (to_heads(one, self._sharers) for one in (query, key, value))
        rotation = self._rotation(query)
        query, key = rotate(query, rotation), rotate(key, rotation)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mask, is_causal = None, query.size(2) > 1
        if attention_mask is not None:
            mask, is_causal = _within_samples(attention_mask), False
        if self.cache is not None:
            key, value = self.cache.extend(key, value)
            mask = self.cache.window.mask(query.size(2))
            is_causal = is_causal and mask is None
        context = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        context = context.permute(2, 0, 1, 3)
        if self._sharers is not None:
            context = to_positions(context, self._sharers)
        return context.flatten(2)

    def _rotation(self, query: Tensor) -> Rotation:
        length, width = query.size(0), query.size(-1)
        if self.cache is None:
            return rotation_of_sequence(length, width, self._rotary_base, query.dtype, query.device)
        positions = self.cache.window.positions(length)
        return rotation_at(positions, width, self._rotary_base, query.dtype)


def _within_samples(numbers: Tensor) -> Tensor:
    """What each position of packs sees, [b, 1, s, s]: earlier ones of the same sample.

    The positions needn't begin anew with every sample: rotation depends on distances alone.
    """
    same = numbers.unsqueeze(2) == numbers.unsqueeze(1)
    return same.tril().unsqueeze(1)
