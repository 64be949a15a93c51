"""Whether the weights that were written compute what the weights that were read compute."""

from collections.abc import Callable

import torch
from torch import Tensor

from glm3cli.checkpoint.adapter.reader import Adapter
from glm3cli.checkpoint.names import WEIGHTS, Weight
from glm3cli.checkpoint.source import StoredSource
from glm3cli.config.model import ModelConfig
from glm3cli.model.plain import plain_logits

# About a second of computing on two cores.
_MOST_PARAMETERS = 500_000_000
_PROMPT_LENGTH = 16
_STEP = 7919  # a prime, so that the prompt is spread over any vocabulary
_BY_NAME = {weight.logical: weight for weight in WEIGHTS}


def is_small(source: StoredSource) -> bool:
    """Whether computing the logits takes no time worth speaking of."""
    return source.model.num_parameters <= _MOST_PARAMETERS


def logits_difference(source: StoredSource, adapter: Adapter, written: StoredSource) -> float:
    """The largest difference between the two models' logits on a fixed prompt, in fp32.

    It is 0 unless the type of the weights was changed, which rounds them (or an adapter was
    merged, whose sum is rounded to the type of the weights).
    """

    def adapted(weight: Weight, layer: int | None) -> Tensor:
        return adapter.merge(weight, layer, source.read(weight, layer))

    source.cat = written.cat = torch.cat  # several weights are needed at a time
    difference = _logits(source.model, adapted) - _logits(written.model, written.read)
    return float(difference.abs().max())


def _logits(model: ModelConfig, read: Callable[[Weight, int | None], Tensor]) -> Tensor:
    prompt = torch.arange(_PROMPT_LENGTH) * _STEP % model.padded_vocab_size
    logits = plain_logits(model, lambda name, layer: read(_BY_NAME[name], layer), prompt)
    return logits.nan_to_num()
