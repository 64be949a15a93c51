"""The operations of a layer as their formulas have them, in fp64 on the host.

They share no code with the kernels that they are compared with, and are slow. Shapes are written as
in device/kernels.py; every function takes tensors of any floating type.
"""

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns hidden / sqrt(mean(hidden^2) + eps) * weight over the last dimension."""
    hidden = hidden.double()
    mean = hidden.square().mean(-1, keepdim=True)
    return hidden / (mean + eps).sqrt() * weight.double()


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Returns gate / (1 + exp(-gate)) * up; the gate is the first half of the last dimension."""
    gate, up = gate_and_up.double().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Turns neighbouring pairs of numbers in the first half of each head.

    Args:
        heads: Queries or keys, [..., d].
        angles: The angle of each pair, [..., d / 4], of a shape that fits the heads.
    """
    heads, angles = heads.double(), angles.double()
    half = heads.size(-1) // 2
    even, odd = heads[..., 0:half:2], heads[..., 1:half:2]
    turned = [
        even * angles.cos() - odd * angles.sin(),
        odd * angles.cos() + even * angles.sin(),
    ]
    return torch.cat([torch.stack(turned, dim=-1).flatten(-2), heads[..., half:]], dim=-1)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Tensor) -> Tensor:
    """Computes attention of some queries over keys and values, by softmax(scale q k) v.

    Args:
        query: The queries, [q, b, heads, d].
        key: The keys, [k, b, groups, d].
        value: The values, [k, b, groups, d].
        scale: Factor on the scores before the softmax.
        seen: Whether a query sees a key, [b or 1, q, k].

    Returns:
        The context, [q, b, heads, d].
    """
    times = query.size(2) // key.size(2)
    queries = query.double().permute(1, 2, 0, 3)
    keys, values = (
        one.double().repeat_interleave(times, dim=2).permute(1, 2, 0, 3) for one in (key, value)
    )
    scores = (queries @ keys.transpose(-1, -2) * scale).masked_fill(~seen.unsqueeze(1), -torch.inf)
    return (scores.softmax(dim=-1) @ values).permute(2, 0, 1, 3)


def causal(queries: Tensor, num_keys: int, segment_ids: Tensor | None = None) -> Tensor:
    """Returns which keys queries see: those at their own or an earlier position of their sample.

    Args:
        queries: The positions of the queries, [q].
        num_keys: The number of keys, whose positions are 0 to `num_keys` - 1.
        segment_ids: The sample of each position, [b, num_keys]; None if all are of one.

    Returns:
        The mask, [b or 1, q, num_keys].
    """
    seen = (torch.arange(num_keys) <= queries.unsqueeze(1)).unsqueeze(0)
    if segment_ids is None:
        return seen
    return seen & (segment_ids[:, queries].unsqueeze(2) == segment_ids.unsqueeze(1))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns log(sum(exp(logits))) - logits[label] over the last dimension."""
    logits = logits.double()
    return logits.logsumexp(-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def adamw_step(
    weight: Tensor,
    gradients: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> Tensor:
    """Returns a weight after a step of AdamW (Loshchilov and Hutter 2019, algorithm 2).

    Args:
        weight: The weight before the step, of any shape.
        gradients: The gradients of all steps so far, that of this one last.
        lr: The learning rate.
        betas: The decay of the first and of the second moment.
        eps: What is added to the root of the second moment.
        decay: The weight decay.
    """
    weight = weight.double()
    first = second = torch.zeros_like(weight)
    for gradient in (one.double() for one in gradients):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient.square()
    steps = len(gradients)
    mean, square = first / (1 - betas[0] ** steps), second / (1 - betas[1] ** steps)
    return weight - lr * (mean / (square.sqrt() + eps) + decay * weight)
