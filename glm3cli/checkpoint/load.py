"""Copies weights from any source into the part of the model that this rank holds."""

from collections.abc import Iterator

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from glm3cli.checkpoint.cuts import cut
from glm3cli.checkpoint.names import Stage, weights_of
from glm3cli.checkpoint.source import WeightSource
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.model.adapters import is_adapter
from glm3cli.parallel.groups import Grid


def load_weights(
    chunks: list[GPTModel], source: WeightSource, parallel: ModelParallelConfig, grid: Grid
) -> None:
    """Fills every parameter of this rank's model but adapters, casting to the parameter's type.

    Args:
        chunks: The model chunks of this pipeline stage, one per virtual stage.
        source: The weights, in any layout.
        parallel: The parallel sizes of the run.
        grid: This rank's place in the tensor- and pipeline-parallel groups.

    Raises:
        CheckpointError: The source lacks a tensor or can't be read.
    """
    with torch.no_grad():
        for parameter, piece in with_pieces(chunks, source, parallel, grid):
            parameter.copy_(piece)


def with_pieces(
    chunks: list[GPTModel], source: WeightSource, parallel: ModelParallelConfig, grid: Grid
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every parameter of this rank's model but adapters, with its piece of the source.

    The arguments and errors are those of `load_weights`.
    """
    for chunk_index, chunk in enumerate(chunks):
        parameters = {
            name: parameter for name, parameter in chunk.named_parameters() if not is_adapter(name)
        }
        layers = parallel.layers_of(source.model.num_layers, grid.pp_rank, chunk_index)
        for weight in weights_of(source.model):
            places = enumerate(layers) if weight.stage is Stage.LAYER else [(None, None)]
            for local, layer in places:
                name = weight.name("mcore", local)
                if name not in parameters:
                    continue  # the embedding or output layer of another stage
                full = source.read(weight, layer)
                piece = cut(full, weight.cut, grid.tp_size, source.model)[grid.tp_rank]
                yield parameters.pop(name), piece
        assert not parameters, f"not in the table of weights: {sorted(parameters)}"
