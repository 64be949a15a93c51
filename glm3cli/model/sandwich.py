"""The layer of GLM-4-0414, which normalises the outputs of attention and MLP before the sums."""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from glm3cli.model.layers import RMSNorm

# Megatron-core's name for the output of a linear layer, and for its bias, which none of ours has.
WithBias = tuple[Tensor, Tensor | None]


class SandwichLayer(TransformerLayer):
    """Megatron-core's layer with two norms more.

    Megatron-core adds an output to the residual stream by what it calls bias-dropout-add; here that
    normalises the output first.

    Attributes:
        post_self_attn_layernorm: The norm of the attention's output.
        post_mlp_layernorm: The norm of the MLP's output.
    """

    def __init__(self, config: Any, *args: Any, **named: Any) -> None:
        super().__init__(config, *args, **named)
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.post_self_attn_layernorm = RMSNorm(config, size, eps)
        self.post_mlp_layernorm = RMSNorm(config, size, eps)
        self.self_attn_bda = _adding(self.post_self_attn_layernorm)
        self.mlp_bda = _adding(self.post_mlp_layernorm)


def _adding(norm: RMSNorm) -> Callable[[bool, bool], Callable[[WithBias, Tensor, float], Tensor]]:
    """Returns what stands for megatron-core's get_bias_dropout_add, with a norm before the sum."""

    def add(output: WithBias, residual: Tensor, _dropout: float) -> Tensor:
        return residual + norm(output[0])

    return lambda _training, _fused: add
