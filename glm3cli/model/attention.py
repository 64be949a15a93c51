"""Core attention on the kernels of the active device, with an optional KV cache for decoding."""

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from glm3cli.device import require_active
from glm3cli.device.kernels import Rotation
from glm3cli.model.cache import KVCache
from glm3cli.model.context import to_heads, to_positions
from glm3cli.model.rotary import rotation_at, rotation_of_sequence


class CoreAttention(torch.nn.Module):
    """Causal grouped-query attention with rotary positions; megatron-core's `core_attention`.

    Keys and values are not expanded to the number of query heads.

    Attributes:
        layer_number: The layer's number in the model, from 1 on, as megatron-core counts.
        scale: Factor on the scores, 1 / sqrt(head size).
        cache: The layer's KV cache, which the inference engine sets; None in training.
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
        """Rotates queries and keys, and attends.

        Args:
            query: The queries, [s, b, heads, d]; with context parallelism s are the positions of
                this rank.
            key: The keys, [s, b, groups, d].
            value: The values, [s, b, groups, d].
            attention_mask: For packed sequences, the sample (segment id) of each position of the
                whole sequence, [b, whole s]: a position attends to its own sample only. Else None.

        Returns:
            The context, [s, b, heads * d].
        """
        if self._sharers is not None:
            query, key, value = (to_heads(one, self._sharers) for one in (query, key, value))
        kernels, rotation = require_active().kernels, self._rotation(query)
        query, key = kernels.rotate(query, rotation), kernels.rotate(key, rotation)
        if self.cache is None:
            context = kernels.attention(query, key, value, self.scale, attention_mask)
        else:
            keys, values = self.cache.extend(key, value)
            window = self.cache.window
            context = kernels.cached_attention(
                query, keys, values, self.scale, window.start, window.padding
            )
        if self._sharers is not None:
            context = to_positions(context, self._sharers)
        return context.flatten(2)

    def _rotation(self, query: Tensor) -> Rotation:
        """Returns the rotation of the positions that `query`, [s, b, heads, d], stands at."""
        length, width = query.size(0), query.size(-1)
        if self.cache is None:
            return rotation_of_sequence(length, width, self._rotary_base, query.dtype, query.device)
        positions = self.cache.window.positions(length, query.device)
        return rotation_at(positions, width, self._rotary_base, query.dtype)
