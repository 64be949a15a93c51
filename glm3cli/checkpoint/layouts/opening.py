"""Opens a MODEL: finds out its layout and gives its reader, or its shape alone.

torch is imported only where weights are read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from glm3cli.checkpoint.locate import Location, locate
from glm3cli.config.model import ModelConfig

if TYPE_CHECKING:
    from glm3cli.checkpoint.source import StoredSource


def read_shape(path: Path) -> ModelConfig:
    """Returns the shape of the MODEL at `path`.

    Raises:
        CheckpointError: There is no model, or its config.json is wrong.
    """
    return shape_at(locate(path))


def shape_at(location: Location) -> ModelConfig:
    """Returns the shape of a MODEL that has been located.

    Raises:
        CheckpointError: The config.json is wrong, or there is none and the weights don't tell.
    """
    if location.config is not None:
        return ModelConfig.from_file(location.config)
    return open_at(location).model  # only the weights themselves can tell


def open_source(path: Path, *, check: bool = True) -> "StoredSource":
    """Opens the weights of a MODEL in any layout.

    Args:
        path: A folder in any layout, or a training run (its newest complete checkpoint).
        check: Whether missing, unknown or misshapen tensors are refused now.

    Raises:
        CheckpointError: There are no weights, or they are damaged or don't fit the config.json.
    """
    return open_at(locate(Path(path)), check=check)


def open_at(location: Location, *, check: bool = True) -> "StoredSource":
    """Opens the weights of a MODEL that has been located; as `open_source`.

    Raises:
        CheckpointError: The weights are damaged or don't fit the config.json.
    """
    from glm3cli.checkpoint.headers import refuse
    from glm3cli.checkpoint.layouts.dist import DistSource
    from glm3cli.checkpoint.layouts.hf import HfSource
    from glm3cli.checkpoint.layouts.ranks import RanksSource

    readers: dict[str, Callable[[Location], StoredSource]] = {
        "hf": HfSource,
        "ranks": RanksSource,
        "dist": DistSource,
    }
    source = readers[location.kind](location)
    if check:
        refuse(source.path, source.problems)
    return source
