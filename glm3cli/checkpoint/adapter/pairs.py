"""`Adapter` and `Pair`: the matrices of a LoRA adapter as tensors, by the weights they change.

The rows of B are in the canonical order of the weight's rows (see `cuts`).
"""

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
    """

    rows: slice
    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that fits a model.

    Attributes:
        pairs: The matrices for each adapted weight; one pair for each of its adapted modules.
    """

    pairs: dict[Slot, list[Pair]]

    def merge(self, weight: Weight, layer: int | None, tensor: Tensor) -> Tensor:
        """Returns W + scale * B A in fp32, or `tensor` itself if the adapter doesn't change it.

        Args:
            weight: The weight.
            layer: Its layer.
            tensor: The canonical tensor W.
        """
        pairs = self.pairs.get((weight, layer))
        if pairs is None:
            return tensor
        merged = tensor.to(torch.float32, copy=True)
        for pair in pairs:
            merged[pair.rows] += (pair.b.float() @ pair.a.float()).mul_(pair.scale)
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
        weights = {weight for weight, _ in pairs}
        found: dict[Slot, list[Pair]] = {}
        for slot in slots(model.num_layers):
            if slot[0] not in weights:
                continue
            outputs, inputs = slot[0].shape(model)
            a, b = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
            if slot in pairs:
                pair = pairs[slot]
                a[: pair.a.size(0)] = pair.a
                b[:, : pair.b.size(1)] = pair.b * (pair.scale / scale)
            found[slot] = [Pair(slice(0, outputs), a, b, scale)]
        return Adapter(found)

    def trimmed(self) -> "Adapter":
        """Returns the same adapter without the zeros that `uniform` has filled in."""
        found = {}
        for slot, pairs in self.pairs.items():
            kept = [_trimmed(pair) for pair in pairs]
            if any(pair.a.size(0) for pair in kept):
                found[slot] = kept
        return Adapter(found)


def _trimmed(pair: Pair) -> Pair:
    """Returns a pair without the rows of A that are 0 where the columns of B are 0, too."""
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
    scale = pairs[0].scale
    blocks: list[Tensor] = []
    for pair in pairs:
        start, stop = max(pair.rows.start, rows.start), min(pair.rows.stop, rows.stop)
        block = torch.zeros(rows.stop - rows.start, pair.b.size(1), dtype=pair.b.dtype)
        part = pair.b[start - pair.rows.start : stop - pair.rows.start]
        block[start - rows.start : stop - rows.start] = part * (pair.scale / scale)
        blocks.append(block)
    return Pair(rows, torch.cat([pair.a for pair in pairs]), torch.cat(blocks, dim=1), scale)
