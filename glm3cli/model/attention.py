"""Core attention on the kernels of the chip, with an optional KV cache for decoding."""

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from glm3cli.device import require_active
from glm3cli.device.kernels import Rotation
from glm3cli.model.cache import CacheWindow
from glm3cli.model.context import to_heads, to_positions
from glm3cli.model.rotary import rotation_at, rotation_of_sequence


class KVCache:
    """Keys and values of one layer for all slots so far, [b, groups, capacity, d] each."""

    def __init__(self, window: CacheWindow, capacity: int) -> None:
        self.window = window
        self._capacity = capacity
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores those of this pass, [s, b, groups, d], and gives the whole cache."""
        if self._keys is None or self._values is None:
            shape = (key.size(1), key.size(2), self._capacity, key.size(3))
            self._keys, self._values = key.new_empty(shape), value.new_empty(shape)
        end = self.window.start + key.size(0)
        self._keys[:, :, self.window.start : end] = key.permute(1, 2, 0, 3)
        self._values[:, :, self.window.start : end] = value.permute(1, 2, 0, 3)
        return self._keys, self._values


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
        kernels, rotation = require_active().kernels, self._rotation(query)
        query, key = kernels.rotate(query, rotation), kernels.rotate(key, rotation)
        if self.cache is None:
            context = kernels.attention(query, key, value, self.scale, attention_mask)
        else:
            keys, values = self.cache.extend(key, value)
            context = kernels.cached_attention(query, keys, values, self.scale, self.cache.window)
        if self._sharers is not None:
            context = to_positions(context, self._sharers)
        return context.flatten(2)

    def _rotation(self, query: Tensor) -> Rotation:
        length, width = query.size(0), query.size(-1)
        if self.cache is None:
            return rotation_of_sequence(length, width, self._rotary_base, query.dtype, query.device)
        positions = self.cache.window.positions(length, query.device)
        return rotation_at(positions, width, self._rotary_base, query.dtype)
