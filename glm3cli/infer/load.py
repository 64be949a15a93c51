"""Builds a model for inference on this rank, and loads its weights and its tokenizer."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from glm3cli.checkpoint.adapter.pairs import Adapter
from glm3cli.checkpoint.adapter.reader import open_adapter
from glm3cli.checkpoint.layouts.opening import open_at
from glm3cli.checkpoint.locate import Location, locate, locate_adapter
from glm3cli.checkpoint.source import StoredSource
from glm3cli.config.inference import InferenceConfig
from glm3cli.config.model import DType, ModelConfig
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.device import Device, require_active
from glm3cli.errors import ConfigError, DataError
from glm3cli.infer.engine import Engine
from glm3cli.infer.model import Model
from glm3cli.parallel.groups import open_grid


def open_model(config: InferenceConfig) -> Model:
    """Joins the other ranks, and loads this rank's part of the model; all ranks must call it.

    The device must be active.

    Raises:
        CheckpointError: The model can't be read.
        ConfigError: The model can't be cut over the parallel sizes, or has an adapter and is to be
            quantized.
        DataError: The model has no tokenizer, or one that has more tokens than its vocabulary.
        DeviceError: The ranks don't find each other.
    """
    device = require_active()
    location = locate(config.model)
    source, adapter = _open(location, config.adapter)
    choices = _open_all(location, config.adapters, source)
    if (adapter is not None or choices) and config.quantize is not None:
        raise ConfigError(
            f"--quantize {config.quantize}: an adapter computes in the same layers, "
            "which would not be rounded",
            "merge it first (glm3 convert mg2hf --lora), or leave --quantize out",
        )
    config = config.with_stages(source.model)
    config.check_fits(source.model)
    tokenizer = Tokenizer.load(config.tokenizer or location.companions)
    if tokenizer.vocab_size > source.model.padded_vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, but the model's "
            f"vocabulary has {source.model.padded_vocab_size} entries",
            "give the tokenizer that belongs to this model with --tokenizer",
        )
    with ExitStack() as stack:
        grid = stack.enter_context(open_grid(config))
        dtype = config.dtype or _default(source.model, device)
        bits = None if config.quantize is None else int(config.quantize.removeprefix("int"))
        engine = Engine(source, config, dtype, grid, adapter=adapter, bits=bits, choices=choices)
        return Model(engine, tokenizer, stack.pop_all())


def _open(location: Location, lora: Path | None) -> tuple[StoredSource, Adapter | None]:
    """Opens the weights of a model, and the adapter that it computes with, if there is one.

    An adapter isn't merged into the weights, because these may be of fewer bits than it needs. Only
    with several are all but the last one merged.

    Args:
        location: The place of the model, which may be a run that trains an adapter.
        lora: The value of --lora.

    Raises:
        CheckpointError: The model or the adapter can't be read, or they don't fit each other.
    """
    adapters = [*location.adapters, *([] if lora is None else [locate_adapter(lora)])]
    source = open_at(replace(location, adapters=tuple(adapters[:-1])))
    return source, open_adapter(adapters[-1], source.model) if adapters else None


def _open_all(
    location: Location, adapters: Mapping[str, Path], source: StoredSource
) -> dict[str, Adapter]:
    """Opens the adapters among which each text chooses.

    Raises:
        CheckpointError: One can't be read, or doesn't fit the model.
        ConfigError: The model is a run that trains an adapter itself.
    """
    if adapters and location.adapters:
        raise ConfigError(
            f"--lora NAME=ADAPTER: {location.folder} computes with an adapter of its own",
            "give the base model as --model, and the run as another NAME=ADAPTER",
        )
    return {name: open_adapter(locate_adapter(at), source.model) for name, at in adapters.items()}


def _default(model: ModelConfig, device: Device) -> DType:
    """Returns the type in which a model runs on a device unless --dtype is given."""
    # 16-bit arithmetic on a CPU is slower than fp32, and less exact.
    return "fp32" if device.name == "cpu" else model.torch_dtype
