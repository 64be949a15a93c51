"""Numbers of weights: those that a rank holds, and those of them that are trained.

The counts are sums over the rows of checkpoint/names.py, the table that also says what is read and
written, so that a new weight is counted wherever memory is predicted. Which weights are trained is
decided by `TrainConfig.trains` alone: they have gradients and optimizer state, the others have
neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from glm3cli.checkpoint.names import Cut, Stage, Weight, weights_of
from glm3cli.config.model import ModelConfig
from glm3cli.config.options.lora import TARGETS
from glm3cli.config.training import TrainConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of weights of a rank or of a model.

    Attributes:
        total: Number of all weights.
        trained: Number of the weights that are trained.
    """

    total: int
    trained: int


def parameters_of_rank(config: TrainConfig, model: ModelConfig, pp_rank: int) -> ParameterCounts:
    """Counts the weights on each tensor parallel rank of pipeline stage `pp_rank`."""
    layers = config.layers_of_stage(model.num_layers, pp_rank)
    places: dict[Stage, Sequence[int | None]] = {
        Stage.FIRST: [None] * (pp_rank == 0),
        Stage.LAYER: layers,
        Stage.LAST: [None] * (pp_rank == config.pp - 1),
    }
    return _count(config, model, places, config.tp)


def parameters_of_model(config: TrainConfig, model: ModelConfig) -> ParameterCounts:
    """Counts the weights of the whole model."""
    places: dict[Stage, Sequence[int | None]] = {stage: [None] for stage in Stage}
    places[Stage.LAYER] = range(model.num_layers)
    return _count(config, model, places, tp=1)


def frozen_of_model(config: TrainConfig, model: ModelConfig) -> int:
    """Counts the weights of the whole model, but its embedding, that aren't trained."""
    counts = parameters_of_model(config, model)
    embedding = sum(
        prod(weight.shape(model))
        for weight in weights_of(model)
        if weight.stage is Stage.FIRST and not config.trains(weight.name("chatglm", None))
    )
    return counts.total - counts.trained - embedding


def _count(
    config: TrainConfig, model: ModelConfig, places: dict[Stage, Sequence[int | None]], tp: int
) -> ParameterCounts:
    """Counts the weights of the table.

    Args:
        config: The settings of the run.
        model: The shape of the model.
        places: The layers that have the weights of each kind of stage; None outside the layers.
        tp: The tensor parallel size.
    """
    total = trained = 0
    adapted = {TARGETS[target] for target in config.lora_targets}
    for weight in weights_of(model):
        layers, size = places[weight.stage], _piece_size(weight, model, tp)
        total += len(layers) * size
        trained += size * sum(config.trains(weight.name("chatglm", layer)) for layer in layers)
        if weight.logical in adapted:
            size = len(layers) * _adapter_size(weight, config, model, tp)
            total += size
            trained += size
    return ParameterCounts(total, trained)


def _adapter_size(weight: Weight, config: TrainConfig, model: ModelConfig, tp: int) -> int:
    """Returns the number of elements of a weight's adapter that a tensor parallel rank holds.

    Its B is cut as the rows of the weight, and its A as the columns.
    """
    shape = list(weight.shape(model))
    shape[1 if weight.cut is Cut.COLS else 0] //= tp
    lengths = shape[0] if config.lora_variant == "dora" else 0
    return (config.lora_rank or 0) * sum(shape) + lengths


def _piece_size(weight: Weight, model: ModelConfig, tp: int) -> int:
    """Returns the number of elements of a weight that one tensor parallel rank holds."""
    shape = list(weight.shape(model))
    if weight.cut is not Cut.WHOLE:
        shape[1 if weight.cut is Cut.COLS else 0] //= tp
    return prod(shape)
