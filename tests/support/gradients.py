"""Compares the gradients on a rank with whole ones in a file."""

from pathlib import Path
from typing import Any

from glm3cli.config.model import ModelConfig
from tests.support.tiny import TINY


def gradient_errors(
    train_step: Any, config: Any, file: Path, model: ModelConfig = TINY
) -> dict[str, float]:
    """The relative error of every gradient on this rank.

    Args:
        train_step: The train step, after a backward pass.
        config: The settings of the run.
        file: A file of whole gradients, by the names of the layout `chatglm`.
        model: The shape of the model.
    """
    from safetensors.torch import load_file

    from glm3cli.checkpoint.cuts import cut
    from glm3cli.model.build import unwrap
    from tests.support import reference as glm

    expected, grid = load_file(file), train_step.grid
    errors = {}
    for index, chunk in enumerate(train_step.chunks):
        layers = config.layers_of(model.num_layers, grid.pp_rank, index)
        parameters = dict(unwrap(chunk).named_parameters())
        for weight, layer in glm.all_slots(model):
            local = layers.index(layer) if layer in layers else None
            name = weight.name("mcore", local)
            if (layer is not None and local is None) or name not in parameters:
                continue
            full = expected[weight.name("chatglm", layer)]
            piece = cut(full, weight.cut, grid.tp_size, model)[grid.tp_rank]
            found = parameters.pop(name).main_grad
            errors[name + f" {layer}"] = float((found - piece).norm() / piece.norm())
        assert not parameters
    return errors
