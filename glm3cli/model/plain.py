"""The family's forward pass in plain torch, without megatron-core and without a process group.

It checks converted weights of any layout by the logits that they give; training and inference use
the model of `build`. Only one weight is in memory at a time, so that it runs for models that are
larger than the memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from glm3cli.config.model import ModelConfig

# Returns a whole weight for its logical name and its layer (None outside the layers).
Read = Callable[[str, int | None], Tensor]


def plain_logits(model: ModelConfig, read: Read, tokens: Tensor) -> Tensor:
    """Computes the logits of one sequence in fp32.

    Args:
        model: The model's shape.
        read: Returns a weight in any floating type; called once for each.
        tokens: The token ids, [s].

    Returns:
        The logits in fp32, [s, vocabulary].
    """
    hidden = read("embedding", None)[tokens].float()
    rotation = _rotation(model, len(tokens))
    for layer in range(model.num_layers):

        def weight(name: str, layer: int = layer) -> Tensor:
            return read(name, layer).float()

        normed = _norm(model, hidden, weight("input_norm"))
        bias = weight("qkv_bias") if model.add_qkv_bias else None
        qkv = functional.linear(normed, weight("qkv_weight"), bias)
        output = functional.linear(_attend(model, qkv, rotation), weight("attention_out"))
        if model.sandwich_norms:
            output = _norm(model, output, weight("attention_out_norm"))
        hidden = hidden + output
        normed = _norm(model, hidden, weight("mlp_norm"))
        gate, up = functional.linear(normed, weight("mlp_up")).chunk(2, dim=-1)
        output = functional.linear(functional.silu(gate) * up, weight("mlp_down"))
        if model.sandwich_norms:
            output = _norm(model, output, weight("mlp_out_norm"))
        hidden = hidden + output
    hidden = _norm(model, hidden, read("final_norm", None).float())
    return functional.linear(hidden, read("output", None).float())


def _norm(model: ModelConfig, hidden: Tensor, weight: Tensor) -> Tensor:
    """Computes the RMSNorm of [s, h]."""
    return functional.rms_norm(hidden, weight.shape, weight, model.layernorm_epsilon)


def _rotation(model: ModelConfig, length: int) -> Tensor:
    """Returns exp(i * angle) of every position and pair as complex numbers, [s, 1, d / 4].

    The first half of a head is rotated, in neighbouring pairs.
    """
    size = model.kv_channels // 2
    frequencies = model.rotary_base ** -(torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(length).float(), frequencies / model.rope_factor)
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(1)


def _rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the pairs in the first half of each head, [s, heads, d]."""
    first, second = heads.chunk(2, dim=-1)
    pairs = torch.view_as_complex(first.reshape(*first.shape[:-1], -1, 2))
    return torch.cat([torch.view_as_real(pairs * rotation).flatten(-2), second], dim=-1)


def _attend(model: ModelConfig, qkv: Tensor, rotation: Tensor) -> Tensor:
    """Computes causal grouped-query attention; `qkv` is [s, Q|K|V], the result [s, Q]."""
    parts = torch.split(qkv, [model.query_size, model.kv_size, model.kv_size], dim=-1)
    query, key, value = (part.reshape(len(part), -1, model.kv_channels) for part in parts)
    query, key = _rotate(query, rotation), _rotate(key, rotation)
    repeats = model.num_attention_heads // model.num_query_groups
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    context = functional.scaled_dot_product_attention(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=True
    )
    return context.transpose(0, 1).flatten(1)
