"""The matrices that a new LoRA adapter begins with, the same at all parallel sizes."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glm3cli.checkpoint.adapter.pairs import Adapter, Pair
from glm3cli.checkpoint.names import WEIGHTS, Slot, slots
from glm3cli.checkpoint.source import WeightSource
from glm3cli.config.options.lora import LoraVariant

# Up to this number of rows or columns, a PiSSA's principal part is computed exactly.
_EXACT = 1024
# Beyond, some more parts and iterations than are needed make it so but for 1e-3 of the smallest one
# (Halko et al. 2011, "Finding structure with randomness").
_MORE, _ITERATIONS = 32, 16


@dataclass(frozen=True)
class FreshAdapter:
    """What a new adapter is to be like.

    Attributes:
        weights: The logical names of the weights to adapt, in all layers.
        rank: The rank of the matrices.
        scale: The factor by which their product is multiplied.
        variant: The kind of adapter.
        seed: The seed of the random generators; each matrix has one of its own.
    """

    weights: Collection[str]
    rank: int
    scale: float
    variant: LoraVariant
    seed: int

    def build(self, source: WeightSource, layers: Iterable[int] | None = None) -> Adapter:
        """Makes the matrices, in fp32; the adapter changes nothing yet.

        A is drawn from U(-1 / sqrt(inputs), 1 / sqrt(inputs)) and B is 0, as PEFT has it
        (tuners/lora/layer.py, reset_lora_parameters). A DoRA begins with the lengths of the rows, a
        PiSSA with the principal part of the weight.

        Args:
            source: The weights of the base model.
            layers: The layers whose matrices are wanted; None for all.
        """
        model = source.model
        wanted = range(model.num_layers) if layers is None else set(layers)
        pairs: dict[Slot, list[Pair]] = {}
        for slot in slots(model):
            if slot[0].logical in self.weights and slot[1] in wanted:
                pairs[slot] = [self._pair(slot, source)]
        return Adapter(pairs)

    def _pair(self, slot: Slot, source: WeightSource) -> Pair:
        """Returns the first matrices of one weight."""
        weight, layer = slot
        outputs, inputs = weight.shape(source.model)
        place = WEIGHTS.index(weight) * (source.model.num_layers + 1) + (layer or 0)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        rows = slice(0, outputs)
        if self.variant == "pissa":
            a, b = _principal(source.read(weight, layer).float(), self.rank, generator)
            a, b = a / math.sqrt(self.scale), b / math.sqrt(self.scale)
            return Pair(rows, a, b, self.scale, start=(a, b))
        bound = 1 / math.sqrt(inputs)
        a = torch.empty(self.rank, inputs).uniform_(-bound, bound, generator=generator)
        magnitude = None
        if self.variant == "dora":
            magnitude = source.read(weight, layer).float().norm(dim=1)
        return Pair(rows, a, torch.zeros(outputs, self.rank), self.scale, magnitude)


def _principal(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns A and B of a matrix's principal part B A, each with the roots of singular values.

    Args:
        matrix: The matrix, [outputs, inputs].
        rank: The rank of the part; a matrix of a lower one gives zeros beside it.
        generator: Draws the directions from which a large matrix is explored.
    """
    if min(matrix.shape) <= _EXACT:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        seed = int(torch.randint(2**31, (1,), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            left, values, turned = torch.svd_lowrank(matrix, rank + _MORE, niter=_ITERATIONS)
        right = turned.T
    a, b = matrix.new_zeros(rank, matrix.size(1)), matrix.new_zeros(matrix.size(0), rank)
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    a[:kept], b[:, :kept] = roots[:, None] * right[:kept], left[:, :kept] * roots
    return a, b
