"""Dropout of the inputs of adapters, the same at all parallel sizes and where a run goes on.

Whether an element is dropped is a hash of the seed, of the token's place in the data, of the module
and of the element (see `noise.uniform`), and so the same on whatever rank the element is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from glm3cli.model.adapters import MODULES, adapters_of
from glm3cli.model.gpt import ChatGLM
from glm3cli.model.noise import uniform

# The seeds of modules are this far apart: an odd number, so that no two draw the same numbers.
_APART = 0x9E3779B97F4A7C15
# Elements that are drawn at once: the numbers take 8 bytes each, the mask that is kept 1.
_AT_ONCE = 2**22


@dataclass
class AdapterDropout:
    """Drops inputs of the adapters of model chunks in training.

    The places go through the layers as `context_mask`, an argument that megatron-core hands on
    unused to layers without cross-attention: so the layers that are recomputed in the backward
    pass get those of their own micro-batch.

    Attributes:
        share: The share of the elements that is dropped.
        seed: The seed of the run.
        places: A number for each token of the next micro-batch that no other token of the run has,
            int64 [b, s]; with context parallelism s are the positions of this rank.
    """

    share: float
    seed: int
    places: Tensor | None = None
    _current: Tensor | None = None

    def attach(self, gpt: ChatGLM) -> None:
        """Makes the adapters of a model chunk drop inputs."""
        gpt.decoder.register_forward_pre_hook(self._hand_on, with_kwargs=True)
        for layer in gpt.decoder.layers:
            layer.register_forward_pre_hook(self._take, with_kwargs=True)
        targets = list(MODULES)
        for (target, layer), adapter in adapters_of(gpt).items():
            module = layer * len(targets) + targets.index(target)
            adapter.dropout = self._of_module(module, is_cut=target in ("proj", "fc2"))

    def _hand_on(
        self, block: torch.nn.Module, args: Any, named: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Gives a block of layers the places of the micro-batch that it is about to work on."""
        if block.training and self.places is not None:
            named["context_mask"] = self.places.T.contiguous()
        return args, named

    def _take(self, _layer: torch.nn.Module, _args: Any, named: dict[str, Any]) -> None:
        """Notes the places that a layer is given."""
        self._current = named.get("context_mask")

    def _of_module(self, module: int, *, is_cut: bool) -> Callable[[Tensor], Tensor]:
        """Returns the dropout of one module's input.

        Args:
            module: The number of the module in the model.
            is_cut: Whether each tensor parallel rank has some elements of every position; else it
                has all elements of its positions.
        """
        return partial(self._drop, self.seed + (module + 1) * _APART, is_cut)

    def _drop(self, seed: int, is_cut: bool, hidden: Tensor) -> Tensor:
        """Returns hidden states, [s, b, h], with some elements 0 and the others scaled up."""
        assert self._current is not None, "the layers were given no places"
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        places, width = self._current, hidden.size(-1)
        if places.size(0) > hidden.size(0):  # sequence parallelism has scattered the positions
            places = places.chunk(ranks)[rank]
        first, total = (rank * width, ranks * width) if is_cut else (0, width)
        kept = torch.empty(hidden.shape, dtype=torch.bool, device=hidden.device)
        step = max(1, _AT_ONCE // (hidden.size(1) * width))
        for start in range(0, len(places), step):
            part = slice(start, start + step)
            drawn = uniform(places[part], width, seed, first, total)
            torch.ge(drawn, 2 * self.share - 1, out=kept[part])
        return torch.where(kept, hidden / (1 - self.share), 0)
