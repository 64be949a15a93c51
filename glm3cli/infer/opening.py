"""Opens a model from the settings of a command; wrong settings are reported before torch starts."""

from typing import TYPE_CHECKING

from glm3cli.checkpoint.adapter.config import read_adapter_config
from glm3cli.checkpoint.layouts.opening import read_shape
from glm3cli.checkpoint.locate import locate_adapter
from glm3cli.config.inference import InferenceConfig
from glm3cli.parallel.interrupts import Signals
from glm3cli.parallel.launch import run_here

if TYPE_CHECKING:
    from glm3cli.infer.model import Model


def check_model(config: InferenceConfig) -> None:
    """Checks that there is a model, and that it can be cut over the ranks as asked.

    Raises:
        CheckpointError: There is no model, its config.json is wrong, or --lora is no adapter.
        ConfigError: The parallel sizes don't fit the number of ranks or the model.
    """
    config.check_world(config.world_size)
    model = read_shape(config.model)
    config.with_stages(model).check_fits(model)
    for adapter in (config.adapter, *config.adapters.values()):
        if adapter is not None:
            read_adapter_config(locate_adapter(adapter))


def open_here(config: InferenceConfig, *, answers: Signals = ()) -> "Model | None":
    """Checks the settings, activates the device, and opens the model.

    Args:
        config: The settings.
        answers: The signals that the command answers; see `parallel.launch.run_here`.

    Returns:
        The model; None in a process that has started ranks by --nproc, after they have ended.

    Raises:
        Glm3Error: Any of its subclasses; message and hint say what is wrong, and what to do.
    """
    check_model(config)
    if not run_here(config, answers=answers):
        return None
    from glm3cli.infer.load import open_model

    return open_model(config)
