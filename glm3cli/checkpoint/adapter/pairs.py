"""`Adapter` and `Pair`: the matrices of a LoRA adapter as tensors, by the weights they change.

The rows of B are in the canonical order of the weight's rows (see `cuts`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glm3cli.checkpoint.names import Slot, Weight, slots
from glm3cli.config.model import ModelConfig


@dataclass(frozen=True)
class Pair:
    """The two matrices of one adapted module.

    Attributes:
        rows: The rows of the weight that they change.
        a: The matrix lora_A, [rank, inputs].
        b: The matrix lora_B, [outputs, rank].
        scale: The factor by which the product B A is multiplied.
        magnitude: The length that each row of W + scale B A gets, [outputs], if the adapter is a
            DoRA, else None. NaN leaves the row as long as it is in W.
        start: What A and B began with, if that product is subtracted from theirs (PiSSA), else
            None.
    """

    rows: slice
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    start: tuple[Tensor, Tensor] | None = None

    def plain(self) -> "Pair":
        """Returns a pair without a start: the one that is subtracted becomes more of its ranks."""
        if self.start is None:
            return self
        a, b = self.start
        return replace(self, a=torch.cat([self.a, a]), b=torch.cat([self.b, -b], 1), start=None)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that fits a model.

    Attributes:
        pairs: The matrices for each adapted weight; one pair for each of its adapted modules.
    """

    pairs: dict[Slot, list[Pair]]

    def merge(self, weight: Weight, layer: int | None, tensor: Tensor) -> Tensor:
        """Returns W + scale * B A in fp32, or `tensor` itself if the adapter doesn't change it.

        The rows of a DoRA get their lengths.

        Args:
            weight: The weight.
            layer: Its layer.
            tensor: The canonical tensor W.
        """
        pairs = self.pairs.get((weight, layer))
        if pairs is None:
            return tensor
        merged = tensor.to(torch.float32, copy=True)
        for pair in map(Pair.plain, pairs):
            rows = merged[pair.rows]
            before = rows.norm(dim=1)
            rows += (pair.b.float() @ pair.a.float()).mul_(pair.scale)
            if pair.magnitude is not None:
                lengths = pair.magnitude.float()
                rows *= (torch.where(lengths.isnan(), before, lengths) / rows.norm(dim=1))[:, None]
        return merged

    def whole(self, model: ModelConfig) -> dict[Slot, Pair]:
        """Returns one pair of matrices for each adapted weight, which changes all its rows.

        Args:
            model: The shape of the base model.
        """
        return {
            slot: joined(pairs, slice(0, slot[0].shape(model)[0]))
            for slot, pairs in self.pairs.items()
        }

    def uniform(self, model: ModelConfig) -> "Adapter":
        """Returns the same adapter with one rank and one scale, in all layers.

        Smaller matrices are filled up with zeros, for which neither gradient nor weight decay does
        anything: where both a row of A and its column of B are 0, they stay so.

        Args:
            model: The shape of the base model.
        """
        pairs = self.whole(model)
        rank = max(pair.a.size(0) for pair in pairs.values())
        scale = next(iter(pairs.values())).scale
        is_dora = any(pair.magnitude is not None for pair in pairs.values())
        weights = {weight for weight, _ in pairs}
        found: dict[Slot, list[Pair]] = {}
        for slot in slots(model):
            if slot[0] not in weights:
                continue
            outputs, inputs = slot[0].shape(model)
            a, b = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
            magnitude = torch.full((outputs,), math.nan) if is_dora else None
            if slot in pairs:
                pair = pairs[slot]
                a[: pair.a.size(0)] = pair.a
                b[:, : pair.b.size(1)] = pair.b * (pair.scale / scale)
                magnitude = pair.magnitude
            found[slot] = [Pair(slice(0, outputs), a, b, scale, magnitude)]
        return Adapter(found)

    def trimmed(self) -> "Adapter":
        """Returns the same adapter as peft knows it: without starts, and without unused ranks.

        These are the zeros that `uniform` has filled in.
        """
        found = {}
        for slot, pairs in self.pairs.items():
            kept = [_trimmed(pair.plain()) for pair in pairs]
            if any(pair.a.size(0) for pair in kept):
                found[slot] = kept
        return Adapter(found)


def _trimmed(pair: Pair) -> Pair:
    """Returns a pair without the rows of A that are 0 where the columns of B are 0, too."""
    if pair.magnitude is not None:
        return pair
    used = pair.a.any(dim=1) | pair.b.any(dim=0)
    return pair if bool(used.all()) else replace(pair, a=pair.a[used], b=pair.b[:, used])


def joined(pairs: Sequence[Pair], rows: slice) -> Pair:
    """Returns one pair of matrices for some rows of a weight.

    Args:
        pairs: The pairs that change any of these rows.
        rows: The rows.

    Returns:
        A pair whose product in these rows is the sum of the products of `pairs`.
    """
    if len(pairs) == 1 and pairs[0].rows == rows:
        return pairs[0]
    scale, pairs = pairs[0].scale, [pair.plain() for pair in pairs]
    is_dora = any(pair.magnitude is not None for pair in pairs)
    magnitude = torch.full((rows.stop - rows.start,), math.nan) if is_dora else None
    blocks: list[Tensor] = []
    for pair in pairs:
        start, stop = max(pair.rows.start, rows.start), min(pair.rows.stop, rows.stop)
        block = torch.zeros(rows.stop - rows.start, pair.b.size(1), dtype=pair.b.dtype)
        part = pair.b[start - pair.rows.start : stop - pair.rows.start]
        block[start - rows.start : stop - rows.start] = part * (pair.scale / scale)
        blocks.append(block)
        if magnitude is not None and pair.magnitude is not None:
            lengths = pair.magnitude[start - pair.rows.start : stop - pair.rows.start]
            magnitude[start - rows.start : stop - rows.start] = lengths
    a, b = torch.cat([pair.a for pair in pairs]), torch.cat(blocks, dim=1)
    return Pair(rows, a, b, scale, magnitude)
