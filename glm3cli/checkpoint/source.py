"""`WeightSource`: where weights are read from, whatever the layout (see `layouts/opening`).

Readers give canonical tensors (see `cuts`) one at a time, as views of mapped files wherever the
layout allows it, so that a model larger than the memory can be read.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from glm3cli.checkpoint.headers import TensorProblem
from glm3cli.checkpoint.locate import Location
from glm3cli.checkpoint.names import Layout, Weight
from glm3cli.checkpoint.scratch import Cat
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ModelParallelConfig


class WeightSource(Protocol):
    """Anything that gives the weights of a model."""

    @property
    def model(self) -> ModelConfig:
        """The model's shape."""

    def read(self, weight: Weight, layer: int | None = None) -> Tensor:
        """The canonical tensor of one row of the table."""


class StoredSource(ABC):
    """Weights in a folder.

    Attributes:
        path: The folder of the weights themselves.
        layout: Their naming and order.
        model: The model's shape.
        config: The config.json that it comes from; None where the weights told the shape.
        iteration: The training iteration, where the folder tells it.
        parallel: How the files are cut.
        problems: What is missing, unknown or of a wrong shape, found in the files' headers.
        cat: Joins the parts of a tensor; one that uses memory again makes what `read` gives
            short-lived.
    """

    layout: Layout

    def __init__(self, location: Location, model: ModelConfig) -> None:
        self.path = location.folder
        self.config = location.config
        self.iteration = location.iteration
        self.model = model
        self.parallel = ModelParallelConfig()
        self.problems: list[TensorProblem] = []
        self.cat: Cat = torch.cat

    @abstractmethod
    def read(self, weight: Weight, layer: int | None = None) -> Tensor:
        """The canonical tensor of one row of the table; don't write to it."""

    @abstractmethod
    def dtype(self, weight: Weight, layer: int | None = None) -> torch.dtype:
        """The stored type of the tensor, without reading it."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that hold the weights."""

    def reading_order(self) -> list[list[Path]]:
        """The files in the order in which the weights are read, those of a group side by side."""
        return [[path] for path in self.files()]


def config_of(location: Location) -> ModelConfig:
    """The model's shape from its config.json.

    Raises:
        CheckpointError: There is none, or it is wrong.
    """
    return ModelConfig.from_file(location.config or location.folder)
