"""The operations that chips have fused kernels for; here in plain torch, which defines them.

The model calls these alone, as `require_active().kernels`. A chip's own kernels replace some.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from torch.utils.weak import WeakIdKeyDictionary

from glm3cli.model.cache import CacheWindow

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SavedForBackward:
    """What kernels keep for the backward pass, where they differ.

    Attributes:
        norm_copies: Of an RMSNorm's input, in fp32; with none, it keeps its input as it is.
        statistics: Bytes of attention's fp32 numbers per position and head.
        copies_values: Whether attention keeps values of their own; else, a view of all of QKV.
    """

    norm_copies: int
    statistics: int
    copies_values: bool


class Kernels:
    """Plain torch, for every chip."""

    # Torch takes the norm apart; its attention keeps a logarithm of each row's sum.
    saved_for_backward: ClassVar[SavedForBackward] = SavedForBackward(
        norm_copies=2, statistics=4, copies_values=False
    )

    def __init__(self) -> None:
        self._masks: Any = WeakIdKeyDictionary()

    def rms_norm(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Hidden / rms(hidden) * weight over the last dim, computed in fp32."""
        return rms_norm(hidden, weight.shape, weight, eps)

    def swiglu(self, gate_and_up: Tensor) -> Tensor:
        """silu(gate) * up of [..., gate and up one after the other] (Shazeer 2020)."""
        return _SwiGLU.apply(gate_and_up)  # type: ignore[no-untyped-call]

    def rotation(self, angles: Tensor, dtype: torch.dtype) -> Rotation:
        """What `rotate` takes for angles [s, b or 1, 1, width / 4] in fp32."""
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(self, heads: Tensor, rotation: Rotation) -> Tensor:
        """Turns the interleaved pairs of the first half of each head, [s, b, heads, width]."""
        return _Rotate.apply(heads, *rotation)  # type: ignore[no-untyped-call]

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, segment_ids: Tensor | None
    ) -> Tensor:
        """Causal attention over grouped queries; K and V are not expanded to the heads.

        Args:
            query: [s, b, heads, d].
            key: [s, b, groups, d], as `value`.
            value: What is averaged.
            scale: Of the scores.
            segment_ids: The sample of its pack that each position belongs to, [b, s]; a position
                sees its own sample only. The positions of a pack may go on: rotation depends on
                distances alone.

        Returns:
            [s, b, heads, d].
        """
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mask = None if segment_ids is None else self._within_samples(segment_ids, query.dtype)
        return _attention(query, key, value, mask, scale).permute(2, 0, 1, 3)

    def _within_samples(self, segment_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """What each position of packs sees, [b, 1, s, s]: earlier ones of the same sample.

        All layers have one mask, and keep one for the backward pass, of the kind that is added to
        the scores: torch would make that of a mask of booleans in every layer.
        """
        masks = self._masks.setdefault(segment_ids, {})
        if dtype not in masks:
            hidden = (segment_ids.unsqueeze(2) != segment_ids.unsqueeze(1)).logical_or_(
                _later(segment_ids)
            )
            mask = torch.zeros(hidden.shape, dtype=dtype, device=segment_ids.device)
            masks[dtype] = mask.masked_fill_(hidden, -torch.inf).unsqueeze(1)
        found: Tensor = masks[dtype]
        return found

    def cached_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: CacheWindow
    ) -> Tensor:
        """Attention of the last `s` slots over all slots so far.

        Args:
            query: [s, b, heads, d].
            keys: The whole cache, [b, groups, capacity, d], as `values`.
            values: What is averaged.
            scale: Of the scores.
            window: Where the pass begins, and what of each row is padding.

        Returns:
            [s, b, heads, d]; without meaning at pad slots.
        """
        length, end = query.size(0), window.start + query.size(0)
        mask = window.mask(length, query.device)
        query = query.permute(1, 2, 0, 3)
        context = _attention(query, keys[:, :, :end], values[:, :, :end], mask, scale)
        return context.permute(2, 0, 1, 3)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """-log softmax(logits)[label], in fp32; logits [..., vocabulary], labels [...]."""
        return _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]

    def gather_matmul(self, rows: Tensor, matrix: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        """Multiplies the rows of all ranks: [m, k], [k, n] -> [m * ranks, n], [m * ranks, k]."""
        gathered = rows.new_empty(rows.size(0) * group.size(), rows.size(1))
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered.matmul(matrix), gathered

    def matmul_scatter(self, rows: Tensor, matrix: Tensor, group: Any) -> Tensor:
        """This rank's rows of the products' sum over ranks: [m, k], [k, n] -> [m / ranks, n]."""
        product = rows.matmul(matrix)
        sums = product.new_empty(product.size(0) // group.size(), product.size(1))
        dist.reduce_scatter_tensor(sums, product, group=group)
        return sums


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """[b, heads, s, d] each; causal where there is no mask."""
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and query.size(2) > 1,
        scale=scale,
        enable_gqa=query.size(1) != key.size(1),
    )


def _later(segment_ids: Tensor) -> Tensor:
    """Which positions, by column, come after those by row; [s, s]."""
    length = segment_ids.size(1)
    return torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).triu_(diagonal=1)


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


class _Rotate(torch.autograd.Function):
    """Writes each half of the result once; the gradient is the rotation the other way."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.rotation = cosines, sines
        return _rotated(heads, cosines, sines, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.rotation
        return _rotated(grads[0], cosines, sines, -1), None, None


def _rotated(heads: Tensor, cosines: Tensor, sines: Tensor, sign: int) -> Tensor:
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
    """Keeps the log-probabilities, and turns them into the gradient where they are."""

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
