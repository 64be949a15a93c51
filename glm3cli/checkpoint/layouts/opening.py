"""Opens a model in any layout: finds out the layout, and returns the reader or only the shape.

torch is imported only where weights are read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from glm3cli.checkpoint.locate import FolderKind, Location, locate
from glm3cli.config.model import ModelConfig

if TYPE_CHECKING:
    from glm3cli.checkpoint.source import StoredSource


def read_shape(path: Path) -> ModelConfig:
    """Returns the shape of a model: from its config.json, or from the weights if it has none.

    Args:
        path: A folder in any layout, or a training run (its newest complete checkpoint).

    Raises:
        CheckpointError: There is no model, or its config.json is wrong.
    """
    return shape_at(locate(path))


def shape_at(location: Location) -> ModelConfig:
    """Returns the shape of a model whose place is known; see `read_shape`.

    Raises:
        CheckpointError: The config.json is wrong, or there is none and the files of the weights
            don't contain the shape.
    """
    if location.config is not None:
        return ModelConfig.from_file(location.config)
    return open_at(location).model  # the files of the weights contain the shape


def open_source(path: Path, *, check: bool = True) -> "StoredSource":
    """Opens the weights of a model.

    Args:
        path: A folder in any layout, or a training run (its newest complete checkpoint).
        check: Whether tensors that are missing, unknown, or of a wrong shape or type are refused.

    Returns:
        The reader of the weights.

    Raises:
        CheckpointError: There are no weights, or they are damaged or don't fit the config.json.
    """
    return open_at(locate(Path(path)), check=check)


def open_at(location: Location, *, check: bool = True) -> "StoredSource":
    """Opens the weights of a model whose place is known; see `open_source`.

    Args:
        location: The place of the model.
        check: Whether tensors that are missing, unknown, or of a wrong shape or type are refused.

    Raises:
        CheckpointError: The weights are damaged or don't fit the config.json.
    """
    from glm3cli.checkpoint.adapter.reader import open_adapter
    from glm3cli.checkpoint.headers import refuse
    from glm3cli.checkpoint.layouts.adapted import AdaptedSource

    source = _reader(location.kind)(location)
    if check:
        refuse(source.path, source.problems)
    if location.adapters:
        adapters = [open_adapter(folder, source.model) for folder in location.adapters]
        return AdaptedSource(source, adapters, location.iteration)
    return source


def _reader(kind: FolderKind) -> "Callable[[Location], StoredSource]":
    """Returns the reader of a kind of folder; the others aren't imported."""
    if kind == "dist":  # takes half a second, all of torch.distributed's tensors
        from glm3cli.checkpoint.layouts.dist import DistSource

        return DistSource
    if kind == "ranks":
        from glm3cli.checkpoint.layouts.ranks import RanksSource

        return RanksSource
    from glm3cli.checkpoint.layouts.hf import HfSource

    return HfSource
