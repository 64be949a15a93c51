"""Random weights as a source, the same ones at every layout."""

import math
from pathlib import Path

import torch
from torch import Tensor

from glm3cli.checkpoint.files.staging import staged
from glm3cli.checkpoint.layouts.companions import copy_companions
from glm3cli.checkpoint.layouts.write_plan import WritePlan
from glm3cli.checkpoint.layouts.writers import write
from glm3cli.checkpoint.names import WEIGHTS, Weight, slots
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ModelParallelConfig

# Rows whose output is added to the residual stream: scaled down by the number of additions
# (GPT-2; megatron-core's output_layer_init_method).
_RESIDUAL = ("attention_out", "mlp_down")


class RandomSource:
    """Weights drawn from N(0, std), norms 1, biases 0.

    Every tensor has a generator of its own, seeded by its place in the model, and is drawn whole:
    how it is cut, or which rank asks, changes nothing.
    """

    layout = "random"

    def __init__(self, model: ModelConfig, seed: int, std: float) -> None:
        self.model = model
        self._seed, self._std = seed, std

    def read(self, weight: Weight, layer: int | None = None) -> Tensor:
        """The full tensor of one row of the table, fp32."""
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


def write_random_model(
    folder: Path, source: RandomSource, companions: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Writes random weights as a Hugging Face folder, with the tokenizer files of `companions`."""
    dtypes = dict.fromkeys(slots(source.model.num_layers), dtype)
    plan = WritePlan(source.model, ModelParallelConfig(), dtypes, shard_bytes=2**30)

    def produce(weight: Weight, layer: int | None) -> Tensor:
        return source.read(weight, layer).to(dtype)

    with staged(folder, force=False) as partial:
        write("chatglm", partial, plan, produce, lambda _path, _end: None)
        copy_companions(companions, partial, source.model)
