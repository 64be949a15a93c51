"""The shape of a MODEL in any layout; imports torch only where the weights alone can tell it."""

from pathlib import Path

from glm3cli.checkpoint.locate import locate
from glm3cli.config.model import ModelConfig


def read_shape(path: Path) -> ModelConfig:
    """The shape of the model at `path`.

    Raises:
        CheckpointError: There is no model, or its config.json is wrong.
    """
    location = locate(path)
    if location.config is not None:
        return ModelConfig.from_file(location.config)
    from glm3cli.checkpoint.source import open_source

    return open_source(path).model
