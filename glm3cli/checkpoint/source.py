"""The interface of everything that weights can be read from, in whatever layout.

`layouts/opening` opens a folder. Its reader returns one canonical tensor (see `cuts`) at a time, as
a view of a mapped file wherever the layout allows it, so that a model larger than the memory can be
read.
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
    """Anything that the weights of a model can be read from."""

    @property
    def model(self) -> ModelConfig:
        """The shape of the model."""

    def read(self, weight: Weight, layer: int | None = None) -> Tensor:
        """Returns the canonical tensor of one weight.

        Args:
            weight: A row of the table of weights.
            layer: The layer, counted from 0; None for weights outside the layers.
        """


class StoredSource(ABC):
    """The weights in a folder; every layout has a reader that inherits from it.

    Attributes:
        path: The folder of the weights themselves.
        layout: The layout of the folder.
        model: The shape of the model.
        config: The config.json that the shape was read from; None if it was found from the weights.
        iteration: The training iteration, if the folder or its files name one, else None.
        parallel: The parallel sizes that the files are cut for.
        unused: What the files hold beside the weights, such as the optimizer's state.
        problems: The tensors that are missing, unknown, or of a wrong shape or type, as found in
            the files' headers.
        cat: The function that joins the parts of a tensor. If it uses its memory again (see
            `Scratch`), a tensor is valid only until others have been read.
    """

    layout: Layout

    def __init__(self, location: Location, model: ModelConfig) -> None:
        self.path = location.folder
        self.config = location.config
        self.iteration = location.iteration
        self.model = model
        self.parallel = ModelParallelConfig()
        self.unused: list[str] = []
        self.problems: list[TensorProblem] = []
        self.cat: Cat = torch.cat

    @abstractmethod
    def read(self, weight: Weight, layer: int | None = None) -> Tensor:
        """Returns the canonical tensor of one weight, which the caller must not change.

        Args:
            weight: A row of the table of weights.
            layer: The layer, counted from 0; None for weights outside the layers.

        Raises:
            CheckpointError: The files are damaged.
        """

    @abstractmethod
    def dtype(self, weight: Weight, layer: int | None = None) -> torch.dtype:
        """Returns the type that a tensor is stored in, without reading the tensor.

        Raises:
            KeyError: The tensor is missing.
        """

    @abstractmethod
    def files(self) -> list[Path]:
        """Returns the files that hold the weights."""

    def reading_order(self) -> list[list[Path]]:
        """Returns the files in groups, in the order in which all weights are read.

        The files of a group are read side by side.
        """
        return [[path] for path in self.files()]


def config_of(location: Location) -> ModelConfig:
    """Reads the model's shape from its config.json.

    Raises:
        CheckpointError: There is no config.json, or it is wrong.
    """
    return ModelConfig.from_file(location.config or location.folder)
