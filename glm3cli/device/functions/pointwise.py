"""The functions of single numbers, pairs and rows: norm, activation, rotation, and loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

# Writes pairs that are turned by angles, of which it gets cosines, sines and a sign.
Turn = Callable[[Tensor, Tensor, Tensor, int, Tensor], None]


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns hidden / rms(hidden) * weight, as `Kernels.rms_norm` has it.

    The bits are the same with a gradient and without: a policy begins as its reference.
    """
    if not torch.is_grad_enabled():
        return _scaled(hidden, weight, eps)[0]
    return _RMSNorm.apply(hidden, weight, eps)  # type: ignore[no-untyped-call]


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Returns silu(gate) * up of [..., 2 ffn], as `Kernels.swiglu` has it."""
    return _SwiGLU.apply(gate_and_up)  # type: ignore[no-untyped-call]


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor, *, as_complex: bool = False) -> Tensor:
    """Returns heads that are turned, as `Kernels.rotate` has it.

    Args:
        heads: The heads.
        cosines: The cosines of the angles.
        sines: The sines of the angles.
        as_complex: Whether pairs are multiplied as complex numbers, in one pass instead of four;
            not every chip can.
    """
    turn = _turned_as_complex if as_complex else _turned
    return _Rotate.apply(heads, cosines, sines, turn)  # type: ignore[no-untyped-call]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the token losses, as `Kernels.cross_entropy` has them."""
    return _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that saves its result before the weight alone, and takes a third of the passes.

    With y = x / rms(x) and the gradient g of y * weight, that of x is
    (g * weight - y * mean(g * weight * y)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        result, normed, inverse = _scaled(hidden, weight, eps)
        ctx.save_for_backward(normed, weight, inverse)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        [grad], (normed, weight, inverse) = grads, ctx.saved_tensors
        grad, scale = _at_least_fp32(grad), _at_least_fp32(weight)
        product = grad * normed
        of_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        means = torch.matmul(product, scale).div_(scale.numel()).unsqueeze(-1)
        torch.mul(grad, scale, out=product).addcmul_(normed, means, value=-1).mul_(inverse)
        return product.to(grads[0].dtype), of_weight, None


def _scaled(hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the norm's result, the result before the weight, and 1 / rms, [..., 1]."""
    numbers = _at_least_fp32(hidden)
    norms = torch.linalg.vector_norm(numbers, dim=-1, keepdim=True)
    inverse = norms.square_().div_(hidden.size(-1)).add_(eps).rsqrt_()
    normed = numbers * inverse
    return (normed * weight).to(hidden.dtype), normed, inverse


def _at_least_fp32(tensor: Tensor) -> Tensor:
    """Returns a tensor of 16 bits in fp32, and others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor, turn: Turn) -> Tensor:
        ctx.rotation, ctx.turn = (cosines, sines), turn
        return _rotated(heads, cosines, sines, 1, turn)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        cosines, sines = ctx.rotation
        return _rotated(grads[0], cosines, sines, -1, ctx.turn), None, None, None


def _rotated(heads: Tensor, cosines: Tensor, sines: Tensor, sign: int, turn: Turn) -> Tensor:
    """Returns the heads turned by the angles (`sign` 1) or by their negatives (-1)."""
    half = heads.size(-1) // 2
    result = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    result[..., half:] = heads[..., half:]
    turn(heads[..., :half], cosines, sines, sign, result[..., :half])
    return result


def _turned(pairs: Tensor, cosines: Tensor, sines: Tensor, sign: int, out: Tensor) -> None:
    """Turns neighbouring numbers, [..., 2 n], into `out`."""
    (even, odd), (new_even, new_odd) = ((one[..., 0::2], one[..., 1::2]) for one in (pairs, out))
    torch.mul(even, cosines, out=new_even).addcmul_(odd, sines, value=-sign)
    torch.mul(odd, cosines, out=new_odd).addcmul_(even, sines, value=sign)


def _turned_as_complex(
    pairs: Tensor, cosines: Tensor, sines: Tensor, sign: int, out: Tensor
) -> None:
    """Does what `_turned` does by products of complex numbers."""
    turns = torch.complex(cosines, sines if sign > 0 else -sines)
    if pairs.stride(-1) != 1:
        pairs = pairs.contiguous()
    numbers, result = (
        torch.view_as_complex(one.view(*one.shape[:-1], -1, 2)) for one in (pairs, out)
    )
    torch.mul(numbers, turns, out=result)


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
