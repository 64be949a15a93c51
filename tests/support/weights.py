"""Joins the weights that ranks hold pieces of, without a file, and compares the weights of runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm3cli.checkpoint.cuts import join
from glm3cli.checkpoint.names import WEIGHTS, Cut, Stage, slots
from glm3cli.checkpoint.source import WeightSource
from glm3cli.config.model import ModelConfig

# The pieces that a rank holds, by the weight's name in the chatglm layout and the piece's
# tensor-parallel rank. They are arrays, because a tensor that goes through a pipe stays in memory
# that two processes share.
Pieces = dict[tuple[str, int], np.ndarray]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The difference between the weights of two runs that began with the same weights.

    Attributes:
        relative: The norm of the difference over the norm of what training has changed; the largest
            of all weights.
        absolute: The largest absolute difference of all elements.
    """

    relative: float
    absolute: float


def pieces_here(train_step: Any, parallel: Any, model: ModelConfig) -> Pieces:
    """Returns the pieces of weights that this rank holds, in fp32."""
    from glm3cli.model.build import unwrap

    grid, pieces = train_step.grid, {}
    for index, chunk in enumerate(train_step.chunks):
        parameters = dict(unwrap(chunk).named_parameters())
        layers = parallel.layers_of(model.num_layers, grid.pp_rank, index)
        for weight in WEIGHTS:
            tp_rank = 0 if weight.cut is Cut.WHOLE else grid.tp_rank
            places = enumerate(layers) if weight.stage is Stage.LAYER else [(None, None)]
            for local, layer in places:
                parameter = parameters.pop(weight.name("mcore", local), None)
                if parameter is not None:
                    piece = parameter.detach().float().cpu().numpy().copy()
                    pieces[weight.name("chatglm", layer), tp_rank] = piece
        assert not parameters
    return pieces


def whole_weights(ranks: Sequence[Pieces], model: ModelConfig) -> Weights:
    """Joins the pieces of all ranks to whole weights, by their names in the chatglm layout.

    Asserts that copies of one piece are the same bit for bit: ranks that drift apart would train
    models of their own.
    """
    found: dict[str, dict[int, np.ndarray]] = {}
    for pieces in ranks:
        for (name, place), piece in pieces.items():
            copy = found.setdefault(name, {}).setdefault(place, piece)
            assert np.array_equal(copy, piece), f"ranks hold different copies of {name}"
    weights = {}
    for weight, layer in slots(model):
        name = weight.name("chatglm", layer)
        by_place = [torch.from_numpy(piece) for _, piece in sorted(found.pop(name).items())]
        weights[name] = join(by_place, weight.cut, model)
        assert weights[name].shape == weight.shape(model)
    assert not found
    return weights


def weights_of(source: WeightSource) -> Weights:
    """Returns all weights of a source, by their names in the chatglm layout."""
    return {
        weight.name("chatglm", layer): source.read(weight, layer)
        for weight, layer in slots(source.model)
    }


def difference(found: Weights, expected: Weights, start: Weights, model: ModelConfig) -> Difference:
    """Returns the difference between two runs that began with the weights `start`."""
    pairs = [
        (
            _that_matter(name, found[name] - expected[name], model),
            _that_matter(name, expected[name] - start[name], model),
        )
        for name in expected
    ]
    return Difference(
        relative=max(float(off.norm() / change.norm()) for off, change in pairs),
        absolute=max(float(off.abs().max()) for off, _ in pairs),
    )


def _that_matter(name: str, tensor: Tensor, model: ModelConfig) -> Tensor:
    """Returns a tensor without the key biases of the channels that aren't rotated.

    These (the second half of each head) add the same to all scores of a query, which softmax takes
    out again. So their gradient is 0 but for its rounding, from which AdamW makes other steps in
    every run.
    """
    if not name.endswith("query_key_value.bias"):
        return tensor
    queries, keys, values = tensor.split([model.query_size, model.kv_size, model.kv_size])
    rotated = keys.view(model.num_query_groups, 2, -1)[:, 0]
    return torch.cat([queries, rotated.flatten(), values])
