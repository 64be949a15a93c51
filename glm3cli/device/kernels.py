"""The operations of the model that some chips have fused kernels for, in plain torch.

The model calls them as methods of `require_active().kernels` and nothing else that depends on the
chip. `Kernels` computes them with torch alone, runs on every chip, and defines the results that
`NpuKernels` (npu/kernels.py), which overrides most of its methods, must agree with.

Shapes are written with s: positions of a sequence, b: sequences (rows of a batch), heads: query
heads, groups: key and value heads (grouped-query attention, Ainslie et al. 2023), d: size of a
head.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from glm3cli.device import functions
from glm3cli.device.dtypes import Quantized
from glm3cli.device.segments import BySegments

# Cosines and sines of the rotary angles, in the form that `Kernels.rotate` takes.
Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SavedForBackward:
    """What a chip's kernels save for the backward pass, where chips differ.

    plan/activations.py counts a layer's memory with these numbers.

    Attributes:
        norm_copies: Number of fp32 copies of its input that an RMSNorm saves; 0 if it saves the
            input itself, in its own type.
        statistics: Bytes of softmax statistics (fp32 numbers) that attention saves per position
            and query head.
        copies_values: Whether attention saves a contiguous copy of the values; if not, it saves
            them as a view, which keeps the whole QKV tensor in memory.
        scores: Whether attention makes and saves the scores of all heads.
    """

    norm_copies: int
    statistics: int
    copies_values: bool
    scores: bool = False


class Kernels:
    """The operations in plain torch.

    Attributes:
        saved_for_backward: What these kernels save for the backward pass.
        composed: The operations, as --without-kernel names them, that a subclass computes of single
            operators of torch's, too, but of others: no operator of the chip shows that it did.
    """

    composed: ClassVar[frozenset[str]] = frozenset()
    # Torch computes the norm in several operations, which save two fp32 copies; its attention
    # saves the logarithm of each row's sum.
    saved_for_backward: ClassVar[SavedForBackward] = SavedForBackward(
        norm_copies=2, statistics=4, copies_values=False
    )

    def __init__(self) -> None:
        self._masks: BySegments[dict[torch.dtype, Tensor]] = BySegments()

    def know_ends(self, segment_ids: Tensor, ends: Sequence[int]) -> None:
        """Takes note of where the samples of packed sequences end, which the host knows.

        Args:
            segment_ids: The segment ids that `attention` will get, [b, s].
            ends: Where each sample ends among their b * s positions, row after row.
        """

    def rms_norm(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Returns hidden / rms(hidden) * weight over the last dimension, computed in fp32."""
        return rms_norm(hidden, weight.shape, weight, eps)

    def swiglu(self, gate_and_up: Tensor) -> Tensor:
        """Returns silu(gate) * up (Shazeer 2020).

        Args:
            gate_and_up: The gate's numbers and, after them, the up projection's, [..., 2 ffn].

        Returns:
            The activations, [..., ffn].
        """
        if not torch.is_grad_enabled():
            gate, up = gate_and_up.chunk(2, dim=-1)
            return silu(gate).mul_(up)
        return functions.swiglu(gate_and_up)

    def rotation(self, angles: Tensor, dtype: torch.dtype) -> Rotation:
        """Returns cosines and sines in the form that `rotate` takes.

        Args:
            angles: The rotary angle of each position and pair, [s, b or 1, 1, d / 4], fp32.
            dtype: The type of the heads that will be rotated.
        """
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(self, heads: Tensor, rotation: Rotation) -> Tensor:
        """Rotates neighbouring pairs of numbers in the first half of each head (RoPE).

        Args:
            heads: Queries or keys, [s, b, heads, d]; the second half of d stays as it is.
            rotation: The result of this class's `rotation`.

        Returns:
            The rotated heads, [s, b, heads, d].
        """
        return functions.rotate(heads, *rotation)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, segment_ids: Tensor | None
    ) -> Tensor:
        """Computes causal grouped-query attention without expanding keys and values to the heads.

        Args:
            query: The queries, [s, b, heads, d].
            key: The keys, [s, b, groups, d].
            value: The values, [s, b, groups, d].
            scale: Factor on the scores before the softmax.
            segment_ids: For packed sequences, the sample that each position belongs to, [b, s]; a
                position attends to its own sample only. Positions are counted through the whole
                pack: rotary attention depends on distances alone.

        Returns:
            The context, [s, b, heads, d].
        """
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mask = None if segment_ids is None else self._within_samples(segment_ids, query.dtype)
        is_causal = mask is None and query.size(2) > 1
        return self.attend(query, key, value, mask, scale, is_causal).permute(2, 0, 1, 3)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        is_causal: bool = False,
    ) -> Tensor:
        """Calls torch's attention, which the attention of training and that of inference share.

        Args:
            query: The queries, [b, heads, s, d].
            key: The keys, [b, groups, keys, d].
            value: The values, [b, groups, keys, d].
            mask: The numbers that are added to the scores; None hides nothing.
            scale: Factor on the scores before the softmax.
            is_causal: Whether a query sees its own position and those before it alone.

        Returns:
            The context, [b, heads, s, d].
        """
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=query.size(1) != key.size(1),
        )

    def _within_samples(self, segment_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the mask of packed sequences, which is added to the scores, [b, 1, s, s].

        It is 0 where the key is at the same or an earlier position of the query's sample, and
        minus infinity elsewhere. All layers share it, and save one for the backward pass: given a
        mask of booleans, torch would make such a mask in every layer.
        """
        masks = self._masks.get(segment_ids, dict)
        if dtype not in masks:
            hidden = (segment_ids.unsqueeze(2) != segment_ids.unsqueeze(1)).logical_or_(
                _later(segment_ids)
            )
            mask = torch.zeros(hidden.shape, dtype=dtype, device=segment_ids.device)
            masks[dtype] = mask.masked_fill_(hidden, -torch.inf).unsqueeze(1)
        return masks[dtype]

    def pack(self, weight: Tensor) -> Tensor:
        """Returns a weight, [out, in], in the form that `linear` multiplies fastest by.

        It may be an opaque tensor; the original isn't needed any more.
        """
        return weight

    def linear(self, hidden: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """Multiplies without a gradient, as inference does, [n, in] -> [n, out].

        Args:
            hidden: The numbers to multiply, [n, in].
            packed: The result of this class's `pack`.
            bias: The numbers that are added, [out].
        """
        return linear(hidden, packed, bias)

    def pack_quantized(self, weight: Quantized, dtype: torch.dtype) -> Any:
        """Returns a quantized weight in the form that `linear_quantized` takes.

        Args:
            weight: The weight.
            dtype: The type of the numbers that will be multiplied.
        """
        return weight

    def linear_quantized(self, hidden: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        """Multiplies as `linear` does, by the result of this class's `pack_quantized`."""
        return linear(hidden, packed.weight().to(hidden.dtype), bias)

    def turns(self, angles: Tensor, dtype: torch.dtype) -> Any:
        """Returns the rotation of one forward pass of inference, as `turn` takes it.

        Args:
            angles: The rotary angle of each token and pair, [n, d / 4], fp32.
            dtype: The type of the heads that will be rotated.
        """
        if dtype == torch.float32:
            return torch.complex(angles.cos(), angles.sin())[:, None, None]
        return self.rotation(angles[:, None, None], dtype)

    def turn(self, heads: Tensor, turns: Any) -> None:
        """Rotates heads in place, without a gradient.

        Args:
            heads: Queries and keys, a view [n, groups, heads, d] of the output of a linear layer.
            turns: The result of this class's `turns`.
        """
        if isinstance(turns, Tensor):  # a pair of numbers is a complex one, and turns by a product
            half = heads[..., : heads.size(-1) // 2]
            torch.view_as_complex(half.view(*half.shape[:-1], -1, 2)).mul_(turns)
        else:
            flat = heads.flatten(1, 2).unsqueeze(1)  # [n, 1, heads, d], as in training
            heads.copy_(self.rotate(flat, turns).view(heads.shape))

    def seen(self, ends: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
        """Returns what one query in each row of a KV cache sees, as `attend_one` takes it.

        It is made once for all layers of a forward pass.

        Args:
            ends: The number of slots that each row's query sees, from the first one on.
            dtype: The type of the queries.
            device: The device of the cache.
        """
        longest = max(ends)
        if min(ends) == longest:
            return longest, None
        return self.seen_until(torch.tensor(ends, device=device), longest, longest, dtype)

    def seen_until(self, ends: Tensor, length: int, capacity: int, dtype: torch.dtype) -> Any:
        """Returns what `seen` does, for ends that the device alone knows.

        Args:
            ends: The number of slots that each row's query sees, from the first one on, [b].
            length: The most slots that a query could see; no end is beyond it.
            capacity: The number of slots in a row of the cache.
            dtype: The type of the queries.
        """
        hidden = torch.arange(length, device=ends.device) >= ends.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=ends.device)
        return length, mask.masked_fill_(hidden, -torch.inf)[:, None, None]

    def attend_one(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, seen: Any
    ) -> Tensor:
        """Computes attention of one new query in each row over a KV cache.

        Args:
            query: The queries, [b, groups, heads / groups, d].
            keys: The keys of the rows, [b, groups, capacity, d].
            values: The values of the rows, [b, groups, capacity, d].
            scale: Factor on the scores before the softmax.
            seen: The result of this class's `seen` or `seen_until`.

        Returns:
            The context, [b, groups, heads / groups, d].
        """
        longest, mask = seen
        # The heads of a group stand where positions would: they share its keys and values, and
        # nothing is repeated or masked for each of them.
        return self.attend(query, keys[:, :, :longest], values[:, :, :longest], mask, scale)

    def attend_chunk(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, start: int
    ) -> Tensor:
        """Computes attention of new queries of one row over its KV cache.

        Args:
            query: The queries at the slots `start` to `start` + s, [s, heads, d].
            keys: The keys of the row, [groups, capacity, d].
            values: The values of the row, [groups, capacity, d].
            scale: Factor on the scores before the softmax.
            start: The first slot of the queries; a query sees its own slot and those before it.

        Returns:
            The context, [s, heads, d].
        """
        length, end = query.size(0), start + query.size(0)
        mask = None if start == 0 or length == 1 else _seen_by_chunk(start, length, query)
        query = query.transpose(0, 1).unsqueeze(0)
        seen = keys[None, :, :end], values[None, :, :end]
        is_causal = mask is None and length > 1
        return self.attend(query, *seen, mask, scale, is_causal)[0].transpose(0, 1)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the token losses, -log softmax(logits)[label], computed in fp32.

        Args:
            logits: The logits in any floating type, [..., vocabulary].
            labels: The right token ids, [...].

        Returns:
            The losses in fp32, [...].
        """
        return functions.cross_entropy(logits, labels)

    def gather_matmul(self, rows: Tensor, matrix: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        """Gathers the rows of all ranks of a group, and multiplies them by a matrix.

        Args:
            rows: This rank's rows, [m, k].
            matrix: This rank's matrix, [k, n].
            group: The process group.

        Returns:
            The product, [m * ranks, n], and the gathered rows, [m * ranks, k].
        """
        gathered = rows.new_empty(rows.size(0) * group.size(), rows.size(1))
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered.matmul(matrix), gathered

    def matmul_scatter(self, rows: Tensor, matrix: Tensor, group: Any) -> Tensor:
        """Multiplies on every rank of a group, and returns this rank's rows of the products' sum.

        Args:
            rows: This rank's rows, [m, k].
            matrix: This rank's matrix, [k, n].
            group: The process group.

        Returns:
            This rank's share of the rows of the sum over all ranks, [m / ranks, n].
        """
        product = rows.matmul(matrix)
        sums = product.new_empty(product.size(0) // group.size(), product.size(1))
        dist.reduce_scatter_tensor(sums, product, group=group)
        return sums


def _later(segment_ids: Tensor) -> Tensor:
    """Returns whether the position of a column comes after that of a row, [s, s]."""
    length = segment_ids.size(1)
    return torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).triu_(diagonal=1)


def _seen_by_chunk(start: int, length: int, query: Tensor) -> Tensor:
    """Returns the mask of `length` queries from slot `start` on, [length, start + length].

    It is added to the scores: 0 where a query sees a slot, and minus infinity elsewhere.
    """
    return _mask_of_chunk(start, length, query.dtype, query.device)


@functools.lru_cache(maxsize=2)
def _mask_of_chunk(start: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Makes the mask once for all layers; of two masks, one is in use and one may come again."""
    mask = torch.full((length, start + length), -torch.inf, dtype=dtype, device=device)
    return mask.triu_(diagonal=start + 1)
