"""Noise on the embeddings of a tuning, by which models answer better (NEFTune).

Each element of a sample of n tokens and width h gets a uniform random number between -1 and 1,
times alpha / sqrt(n h) (source: Jain et al. 2023, "NEFTune: Noisy embeddings improve instruction
finetuning"). The number is a hash of the seed, of the token's place in the data, and of the
element: so it is the same at all parallel sizes, and where a run goes on.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

# Steele et al. 2014, "Fast splittable pseudorandom number generators": the mixer of SplitMix64 and
# its increment, as signed numbers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MIXERS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_LAST_SHIFT = 31
_BITS = 24  # of a random number, as many as fp32 holds


@dataclass
class EmbeddingNoise:
    """Adds noise to the outputs of embeddings while they are trained.

    Attributes:
        seed: The seed of the run.
        places: A number for each token of the next micro-batch that no other token of the run has,
            int64 [b, s]; with context parallelism s are the positions of this rank. None adds no
            noise.
        scales: The largest size of the noise of each token, [b, s]; 0 for padding.
    """

    seed: int
    places: Tensor | None = None
    scales: Tensor | None = None
    _hooks: list[Any] = field(default_factory=list)

    def attach(self, embedding: torch.nn.Module) -> None:
        """Makes an embedding of megatron-core call this whenever it has run."""
        self._hooks.append(embedding.register_forward_hook(self._add))

    def _add(self, embedding: torch.nn.Module, _inputs: Any, hidden: Tensor) -> Tensor:
        """Returns hidden states with noise, [s, b, h] or this rank's positions of them."""
        if self.places is None or self.scales is None or not embedding.training:
            return hidden
        places, scales = self.places.T, self.scales.T
        if places.size(0) > hidden.size(0):  # sequence parallelism has scattered the positions
            parts = parallel_state.get_tensor_model_parallel_world_size()
            rank = parallel_state.get_tensor_model_parallel_rank()
            places, scales = places.chunk(parts)[rank], scales.chunk(parts)[rank]
        noise = uniform(places, hidden.size(-1), self.seed) * scales.unsqueeze(-1)
        return hidden + noise.to(hidden.dtype)


def uniform(
    places: Tensor, width: int, seed: int, first: int = 0, total: int | None = None
) -> Tensor:
    """Returns random numbers that depend on nothing but the arguments.

    Args:
        places: The number of each token, int64 [s, b].
        width: The number of elements of a token that are wanted.
        seed: The seed.
        first: The first of them.
        total: The number of elements that a token has in all; None if all are wanted.

    Returns:
        Numbers in [-1, 1), fp32 [s, b, width].
    """
    elements = torch.arange(first, first + width, device=places.device)
    total = width if total is None else total
    state = (places.unsqueeze(-1) * total + elements + _signed(seed * total)) * _INCREMENT
    for shift, factor in _MIXERS:
        state = (state ^ _shifted(state, shift)) * factor
    state = state ^ _shifted(state, _LAST_SHIFT)
    return _shifted(state, 64 - _BITS).float() / 2 ** (_BITS - 1) - 1


def _signed(number: int) -> int:
    """Returns a number's last 64 bits as a signed number."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(state: Tensor, places: int) -> Tensor:
    """Returns numbers shifted to the right, as if they had no sign."""
    return (state >> places) & (2 ** (64 - places) - 1)
