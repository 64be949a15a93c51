"""Random weights that can be read like those of a checkpoint: where a training from scratch begins.

`convert/random_model` writes them to a folder.
"""

import math

import torch
from torch import Tensor

from glm3cli.checkpoint.names import WEIGHTS, Weight
from glm3cli.config.model import ModelConfig

# The weights whose outputs are added to the residual stream. They are scaled down by the square
# root of the number of additions (GPT-2; megatron-core's output_layer_init_method).
_RESIDUAL = ("attention_out", "mlp_down")


class RandomSource:
    """A `WeightSource` whose weights are drawn from N(0, std); norms are 1 and biases 0.

    Every tensor has a random generator of its own, seeded by its place in the model, and is drawn
    whole. So the weights are the same at any parallel sizes and on every rank.

    Attributes:
        layout: Always "random".
        model: The model's shape.
    """

    layout = "random"

    def __init__(self, model: ModelConfig, seed: int, std: float) -> None:
        """Sets the distribution of the weights.

        Args:
            model: The model's shape.
            seed: The seed of all random generators.
            std: The standard deviation of the weights. Those whose outputs are added to the
                residual stream have std / sqrt(2 * layers).
        """
        self.model = model
        self._seed, self._std = seed, std

    def read(self, weight: Weight, layer: int | None = None) -> Tensor:
        """Returns the whole tensor of one row of the table of weights, in fp32."""
        shape = weight.shape(self.model)
        if "norm" in weight.logical:
            return torch.ones(shape)
        if len(shape) == 1:
            return torch.zeros(shape)
        generator = torch.Generator()
        place = WEIGHTS.index(weight) * (self.model.num_layers + 1) + (layer or 0)
        generator.manual_seed(self._seed * 1_000_003 + place)
        scale = math.sqrt(2 * self.model.num_layers) if weight.logical in _RESIDUAL else 1.0
        return torch.empty(shape).normal_(0.0, self._std / scale, generator=generator)
