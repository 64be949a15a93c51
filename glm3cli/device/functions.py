"""Functions of plain torch with gradients of their own, which save less for the backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Returns silu(gate) * up of [..., 2 ffn], as `Kernels.swiglu` has it."""
    return _SwiGLU.apply(gate_and_up)  # type: ignore[no-untyped-call]


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Returns heads that are turned, as `Kernels.rotate` has it."""
    return _Rotate.apply(heads, cosines, sines)  # type: ignore[no-untyped-call]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the token losses, as `Kernels.cross_entropy` has them."""
    return _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    """SwiGLU that saves its input alone and writes both halves of its gradient into one tensor."""

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


class _Rotate(torch.autograd.Function):
    """Rotary positions, written into the result once; the gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.rotation = cosines, sines
        return _rotated(heads, cosines, sines, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.rotation
        return _rotated(grads[0], cosines, sines, -1), None, None


def _rotated(heads: Tensor, cosines: Tensor, sines: Tensor, sign: int) -> Tensor:
    """Returns the heads turned by the angles (`sign` 1) or by their negatives (-1)."""
    half = heads.size(-1) // 2
    result = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    result[..., half:] = heads[..., half:]
    (even, odd), (new_even, new_odd) = (
        (tensor[..., 0:half:2], tensor[..., 1:half:2]) for tensor in (heads, result)
    )
    torch.mul(even, cosines, out=new_even).addcmul_(odd, sines, value=-sign)
    torch.mul(odd, cosines, out=new_odd).addcmul_(even, sines, value=sign)
    return result


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy that saves log-probabilities and turns them into the gradient in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        ctx.save_for_backward(log_probabilities, labels)
        ctx.dtype = logits.dtype
        return -log_probabilities.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        [grad], (log_probabilities, labels) = grads, ctx.saved_tensors
        # The graph is run once, as every schedule of megatron-core does it.
        result = log_probabilities.exp_()
        ones = torch.ones_like(labels, dtype=result.dtype).unsqueeze(-1)
        result.scatter_add_(-1, labels.unsqueeze(-1), -ones)
        return result.mul_(grad.unsqueeze(-1)).to(ctx.dtype), None
