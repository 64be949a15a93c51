"""ChatGLM3's activation: SwiGLU, between the two linear layers of megatron-core's MLP."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


class SwiGLU:
    """The activation of megatron-core's MLP; its own torch path makes four tensors more."""

    def __init__(self, config: Any) -> None:
        pass

    def __call__(self, gate_and_up: Tensor) -> Tensor:
        """[s, b, 2 ffn] -> [s, b, ffn]."""
        return swiglu(gate_and_up)


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., gate and up one after the other] (Shazeer 2020)."""
    return _SwiGLU.apply(gate_and_up)  # type: ignore[no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone, and writes both halves of the gradient into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        [grad], [gate_and_up] = grads, ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        torch.mul(silu(gate), grad, out=of_up)
        return result
