"""Numbers of weights: those that a rank holds, and those of them that are trained.

The counts are sums over the rows of checkpoint/names.py, the table that also says what is read and
written, so that a new weight is counted wherever memory is predicted. Which weights are trained is
decided by `TrainConfig.trains` alone: they have gradients and optimizer state, the others have
neither.
"""

from dataclasses import dataclass
from math import prod

from glm3cli.checkpoint.names import WEIGHTS, Cut, Stage, Weight
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
    chunks = range(config.vpp)
    layers = sum(len(config.layers_of(model.num_layers, pp_rank, chunk)) for chunk in chunks)
    copies = {
        Stage.FIRST: int(pp_rank == 0),
        Stage.LAYER: layers,
        Stage.LAST: int(pp_rank == config.pp - 1),
    }
    return _count(config, model, copies, config.tp)


def parameters_of_model(config: TrainConfig, model: ModelConfig) -> ParameterCounts:
    """Counts the weights of the whole model."""
    copies = {Stage.FIRST: 1, Stage.LAYER: model.num_layers, Stage.LAST: 1}
    return _count(config, model, copies, tp=1)


def _count(
    config: TrainConfig, model: ModelConfig, copies: dict[Stage, int], tp: int
) -> ParameterCounts:
    """Counts the weights of the table, each as often as `copies` says for its kind of stage."""
    total = trained = 0
    adapted = {TARGETS[target] for target in config.lora_targets}
    for weight in WEIGHTS:
        size = copies[weight.stage] * _piece_size(weight, model, tp)
        total += size
        trained += size if config.trains(weight.logical) else 0
        if weight.logical in adapted:
            size = copies[weight.stage] * _adapter_size(weight, config, model, tp)
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
