"""Opens a model for inference on this rank."""

from collections.abc import Iterator
from contextlib import contextmanager

from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.checkpoint.locate import locate
from glm3cli.config.inference import InferenceConfig
from glm3cli.config.model import DType, ModelConfig
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.device import Device, require_active
from glm3cli.errors import DataError
from glm3cli.infer.engine import Engine
from glm3cli.parallel.groups import open_grid


@contextmanager
def open_engine(config: InferenceConfig) -> Iterator[tuple[Engine, Tokenizer]]:
    """Joins the other ranks, and loads this rank's part of the model.

    Raises:
        CheckpointError: The model can't be read.
        DataError: It has no tokenizer.
    """
    device = require_active()
    source = open_source(config.model)
    config.check_fits(source.model)
    tokenizer = Tokenizer.load(config.tokenizer or locate(config.model).companions)
    if tokenizer.vocab_size > source.model.padded_vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, but the model's "
            f"vocabulary has {source.model.padded_vocab_size} entries",
            "give the tokenizer that belongs to this model with --tokenizer",
        )
    with open_grid(config) as grid:
        yield (
            Engine(source, config, config.dtype or _default(source.model, device), grid),
            tokenizer,
        )


def _default(model: ModelConfig, device: Device) -> DType:
    # 16-bit arithmetic on a CPU is slower than fp32, and less exact.
    return "fp32" if device.name == "cpu" else model.torch_dtype
