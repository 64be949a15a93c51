"""Norm, activation, rotation and loss."""

from typing import Any

import torch
from torch import Tensor

from tests.support.npu.operators.kernel import FLOATS, kernel, require


@kernel
def npu_rms_norm(hidden: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    require(hidden.dtype in FLOATS, f"npu_rms_norm: no {hidden.dtype}")
    require(gamma.dtype == hidden.dtype, "npu_rms_norm: gamma has another type than the input")
    require(gamma.shape == hidden.shape[-1:], "npu_rms_norm: gamma has another size")
    rstd = (hidden.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (hidden.float() * rstd * gamma.float()).to(hidden.dtype), rstd


@kernel
def npu_rms_norm_backward(
    dy: Tensor, hidden: Tensor, gamma: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    require(dy.dtype == hidden.dtype == gamma.dtype, "npu_rms_norm_backward: types differ")
    require(rstd.dtype == torch.float32, "npu_rms_norm_backward: rstd is not fp32")
    normed = hidden.float() * rstd
    of_normed = dy.float() * gamma.float()
    of_hidden = rstd * (of_normed - normed * (of_normed * normed).mean(-1, keepdim=True))
    of_gamma = (dy.float() * normed).flatten(0, -2).sum(0)
    return of_hidden.to(hidden.dtype), of_gamma


@kernel
def npu_swiglu(values: Tensor, dim: int) -> Tensor:
    require(values.dtype in FLOATS, f"npu_swiglu: no {values.dtype}")
    gate, up = values.chunk(2, dim)
    return gate * torch.sigmoid(gate) * up


@kernel
def npu_swiglu_backward(grad: Tensor, values: Tensor, dim: int) -> Tensor:
    require(grad.dtype == values.dtype, "npu_swiglu_backward: types differ")
    gate, up = values.chunk(2, dim)
    sigmoid = torch.sigmoid(gate)
    of_gate = grad * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    return torch.cat([of_gate, grad * gate * sigmoid], dim)


@kernel
def npu_rotary_mul(
    values: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate: Tensor | None = None
) -> Tensor:
    require(rotate is None, "npu_rotary_mul: rotate is not for these modes")
    require(values.dim() == r1.dim() == r2.dim() == 4, "npu_rotary_mul: not 4 dims")
    require(r1.dtype == r2.dtype == values.dtype, "npu_rotary_mul: types differ")
    require(r1.shape == r2.shape, "npu_rotary_mul: r1 and r2 differ in shape")
    require(r1.size(3) == values.size(3), "npu_rotary_mul: r1 isn't as wide as the input")
    require(values.size(3) % 2 == 0 and values.size(3) < 896, "npu_rotary_mul: D")
    if rotary_mode == "half":
        first, second = values.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        require(rotary_mode == "interleave", f"npu_rotary_mul: mode {rotary_mode}")
        along = [i for i in range(3) if r1.size(i) > 1 or values.size(i) == 1]
        position = next((i for i in range(3) if r1.size(i) > 1), along[0] if along else -1)
        require(
            position >= 0 and r1.size(position) == values.size(position),
            "npu_rotary_mul: interleave takes 11SD, 1S1D, or S11D",
        )
        others = [i for i in range(3) if i != position]
        require(
            all(r1.size(i) == 1 for i in others),
            "npu_rotary_mul: interleave takes 11SD, 1S1D, or S11D",
        )
        require(
            values.size(others[0]) * values.size(others[1]) < 1000, "npu_rotary_mul: B * N >= 1000"
        )
        turned = torch.stack([-values[..., 1::2], values[..., ::2]], -1).flatten(-2)
    return values * r1 + turned * r2


@kernel
def npu_cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale_for_zloss: float,
    return_zloss: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require(logits.dim() == 2 and target.dim() == 1, "npu_cross_entropy_loss: not [N, C] and [N]")
    require(logits.dtype in FLOATS, f"npu_cross_entropy_loss: no {logits.dtype}")
    require(target.dtype == torch.int64, "npu_cross_entropy_loss: target is not int64")
    require(logits.size(0) <= 200_000, "npu_cross_entropy_loss: N > 200,000")
    require(label_smoothing == lse_square_scale_for_zloss == 0 and not return_zloss, "no zloss")
    shifted = logits - logits.max(-1, keepdim=True).values
    log_prob = shifted - shifted.exp().sum(-1, keepdim=True).log()
    losses = -log_prob[torch.arange(len(target)), target]
    reduced = {"none": losses, "sum": losses.sum()[None], "mean": losses.mean()[None]}[reduction]
    empty = logits.new_empty(0)
    return reduced, log_prob, empty, empty.clone()


@kernel
def npu_cross_entropy_loss_backward(
    grad_loss: Tensor,
    log_prob: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_zloss: Tensor | None,
    lse_for_zloss: Tensor | None,
    reduction: str,
    *_options: Any,
) -> Tensor:
    require(grad_loss.dtype == log_prob.dtype, "npu_cross_entropy_loss_backward: types differ")
    require(target.dtype == torch.int64, "npu_cross_entropy_loss_backward: target is not int64")
    shares = log_prob.exp()
    shares[torch.arange(len(target)), target] -= 1
    if reduction == "none":
        require(grad_loss.shape == target.shape, "npu_cross_entropy_loss_backward: grad_loss")
        return shares * grad_loss[:, None]
    return shares * grad_loss / (len(target) if reduction == "mean" else 1)
