"""From settings to an opened model; what is wrong with them is said before torch is imported."""

from typing import TYPE_CHECKING

from glm3cli.checkpoint.layouts.opening import read_shape
from glm3cli.config.inference import InferenceConfig
from glm3cli.parallel.launch import run_here

if TYPE_CHECKING:
    from glm3cli.infer.model import Model


def check_model(config: InferenceConfig) -> None:
    """Checks that the ranks there are can hold the model.

    Raises:
        CheckpointError: There is no model, or its config.json is wrong.
        ConfigError: The sizes don't divide.
    """
    config.check_world(config.world_size)
    config.check_fits(read_shape(config.model))


def open_here(config: InferenceConfig) -> "Model | None":
    """Checks the settings, prepares the device, and opens the model.

    Returns:
        The model; None in a process that has started ranks by --nproc, when they are done.

    Raises:
        Glm3Error: As its children say.
    """
    check_model(config)
    if not run_here(config):
        return None
    from glm3cli.infer.load import open_model

    return open_model(config)
