"""Opens a model for inference on this rank."""

from collections.abc import Iterator
from contextlib import contextmanager

from glm3cli.checkpoint.locate import locate
from glm3cli.checkpoint.source import open_source
from glm3cli.config.inference import InferenceConfig
from glm3cli.config.model import DType, ModelConfig
from glm3cli.data.tokenizer import Tokenizer
from glm3cli.device import Device, select
from glm3cli.infer.engine import Engine
from glm3cli.parallel.groups import open_grid


@contextmanager
def open_engine(config: InferenceConfig) -> Iterator[tuple[Engine, Tokenizer]]:
    """Activates the device, joins the other ranks, and loads this rank's part of the model.

    Raises:
        CheckpointError: The model can't be read.
        DataError: It has no tokenizer.
    """
    device = select(config.device)
    device.activate()
    source = open_source(config.model)
    config.check_fits(source.model)
    tokenizer = Tokenizer.load(config.tokenizer or locate(config.model).companions)
    with open_grid(config) as grid:
        yield Engine(source, config, config.dtype or _default(source.model, device), grid), tokenizer


def _default(model: ModelConfig, device: Device) -> DType:
    # 16-bit arithmetic on a CPU is slower than fp32, and less exact.
    return "fp32" if device.name == "cpu" else model.torch_dtype
