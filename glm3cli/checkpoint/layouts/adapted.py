"""`AdaptedSource`: a base model's weights with LoRA adapters merged into them as they are read."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from glm3cli.checkpoint.adapter.pairs import Adapter
from glm3cli.checkpoint.names import Weight
from glm3cli.checkpoint.source import StoredSource


class AdaptedSource(StoredSource):
    """A base model with adapters, which can be read like a model that has them merged.

    It has the attributes of the base model's source.
    """

    def __init__(
        self, base: StoredSource, adapters: Sequence[Adapter], iteration: int | None
    ) -> None:
        """Joins the weights of the base model and the adapters.

        Args:
            base: The weights of the base model.
            adapters: The adapters, in the order in which they are merged.
            iteration: The training iteration of the last adapter, if it is known.
        """
        self._base, self._adapters = base, adapters
        self.layout = base.layout
        self.path, self.config, self.model = base.path, base.config, base.model
        self.parallel, self.problems, self.cat = base.parallel, base.problems, base.cat
        self.unused, self.iteration = base.unused, iteration

    def read(self, weight: Weight, layer: int | None = None) -> Tensor:
        """Returns the canonical tensor of one weight, in the type of the base model.

        Raises:
            CheckpointError: The files of the base model are damaged.
        """
        self._base.cat = self.cat
        tensor = merged = self._base.read(weight, layer)
        for adapter in self._adapters:
            merged = adapter.merge(weight, layer, merged)
        return merged.to(tensor.dtype)

    def dtype(self, weight: Weight, layer: int | None = None) -> torch.dtype:
        """Returns the type that the base model stores a tensor in."""
        return self._base.dtype(weight, layer)

    def files(self) -> list[Path]:
        """Returns the files that hold the base model's weights."""
        return self._base.files()

    def reading_order(self) -> list[list[Path]]:
        """Returns the files of the base model in groups, in the order of reading."""
        return self._base.reading_order()
