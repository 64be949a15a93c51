"""Core attention of training, on the kernels of the active device."""

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from glm3cli.device import require_active
from glm3cli.model.context import to_heads, to_positions
from glm3cli.model.rotary import rotation_of_sequence


class CoreAttention(torch.nn.Module):
    """Causal grouped-query attention with rotary positions; megatron-core's `core_attention`.

    Keys and values are not expanded to the number of query heads.

    Attributes:
        layer_number: The layer's number in the model, from 1 on, as megatron-core counts.
        scale: Factor on the scores, 1 / sqrt(head size).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        rotary_base: float,
        rotary_factor: float,
        **_megatron: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.scale = config.kv_channels**-0.5
        self._rotary_base, self._rotary_factor = rotary_base, rotary_factor
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
        kernels = require_active().kernels
        rotation = rotation_of_sequence(
            query.size(0),
            query.size(-1),
            self._rotary_base,
            query.dtype,
            query.device,
            self._rotary_factor,
        )
        query, key = kernels.rotate(query, rotation), kernels.rotate(key, rotation)
        context = kernels.attention(query, key, value, self.scale, attention_mask)
        if self._sharers is not None:
            context = to_positions(context, self._sharers)
        return context.flatten(2)
