"""The matrices that a new LoRA adapter begins with, the same at all parallel sizes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glm3cli.checkpoint.adapter.pairs import Adapter, Pair
from glm3cli.checkpoint.names import WEIGHTS, Slot, slots
from glm3cli.config.model import ModelConfig


def fresh_adapter(
    model: ModelConfig, weights: Sequence[str], rank: int, scale: float, seed: int
) -> Adapter:
    """Returns an adapter that changes nothing yet, in fp32.

    A is drawn from U(-1 / sqrt(inputs), 1 / sqrt(inputs)) and B is 0, as PEFT has it
    (tuners/lora/layer.py, reset_lora_parameters).

    Args:
        model: The shape of the base model.
        weights: The logical names of the weights to adapt, in all layers.
        rank: The rank of the matrices.
        scale: The factor by which their product is multiplied.
        seed: The seed of the random generators; each matrix has one of its own.
    """
    pairs: dict[Slot, list[Pair]] = {}
    for weight, layer in slots(model.num_layers):
        if weight.logical in weights:
            outputs, inputs = weight.shape(model)
            a = _drawn((weight, layer), (rank, inputs), model, seed)
            pair = Pair(slice(0, outputs), a, torch.zeros(outputs, rank), scale)
            pairs[weight, layer] = [pair]
    return Adapter(pairs)


def _drawn(slot: Slot, shape: tuple[int, int], model: ModelConfig, seed: int) -> Tensor:
    """Returns the matrix A of a weight, [rank, inputs]."""
    weight, layer = slot
    place = WEIGHTS.index(weight) * (model.num_layers + 1) + (layer or 0)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
