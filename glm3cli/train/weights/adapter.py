"""The adapter of a run that trains one (LoRA): its shape, what it begins with, and its config."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from glm3cli.checkpoint.locate import locate_adapter
from glm3cli.config.model import ModelConfig
from glm3cli.config.options.lora import TARGETS
from glm3cli.config.training import TrainConfig
from glm3cli.errors import ConfigError

if TYPE_CHECKING:
    from glm3cli.checkpoint.adapter.config import AdapterConfig
    from glm3cli.checkpoint.adapter.pairs import Adapter
    from glm3cli.checkpoint.source import WeightSource
    from glm3cli.model.adapters import AdapterShapes


def with_adapter(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    """Returns the settings of a run with rank, alpha and targets of the adapter that it trains.

    Args:
        config: The settings as the user gave them; --adapter may name an adapter to start from.
        model: The shape of the model.

    Raises:
        ConfigError: An option says otherwise than the adapter that --adapter names, or there is no
            base model.
        CheckpointError: That adapter isn't there, is damaged, or belongs to another model.
    """
    if not config.is_adapted:
        return config
    if config.model is None:
        raise ConfigError(
            "an adapter is trained for a model, and --from-scratch has none on the disk",
            "give --model, or train the weights first",
        )
    if config.adapter is None:
        return config
    from glm3cli.checkpoint.adapter.config import read_adapter_config
    from glm3cli.checkpoint.adapter.reader import open_adapter

    folder = locate_adapter(config.adapter)
    adapter = open_adapter(folder, model).uniform(model)
    kind = read_adapter_config(folder)
    [pair] = next(iter(adapter.pairs.values()))
    rank = pair.a.size(0)
    adapted = {weight.logical for weight, _ in adapter.pairs}
    targets = [target for target, logical in TARGETS.items() if logical in adapted]
    variant = "dora" if kind.use_dora else "rslora" if kind.use_rslora else "lora"
    found = {
        "lora_rank": rank,
        "lora_alpha": pair.scale * (math.sqrt(rank) if variant == "rslora" else rank),
        "lora_target": ",".join(targets),
        "lora_variant": variant,
    }
    for name, value in found.items():
        given = getattr(config, name)
        if given is not None and not _equal(given, value):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} {given}, but the adapter {config.adapter} has {value}",
                f"leave {flag} out: --adapter brings it",
            )
    return config.model_copy(update=found)


def _equal(given: object, found: object) -> bool:
    """Says whether an option has the value that an adapter has."""
    if isinstance(given, str):
        return {name.strip() for name in given.split(",")} == set(str(found).split(","))
    return math.isclose(float(str(given)), float(str(found)), rel_tol=1e-6)


def first_adapter(
    config: TrainConfig, source: "WeightSource", layers: Iterable[int] | None = None
) -> "Adapter":
    """Returns the adapter that a run begins with: that of --adapter, or a new one.

    Args:
        config: The settings of the run, as `with_adapter` returns them.
        source: The weights of the base model.
        layers: The layers whose matrices are wanted; None for all.

    Raises:
        CheckpointError: The adapter of --adapter is damaged, or belongs to another model.
    """
    from glm3cli.checkpoint.adapter.fresh import FreshAdapter
    from glm3cli.checkpoint.adapter.reader import open_adapter

    if config.adapter is not None:
        return open_adapter(locate_adapter(config.adapter), source.model).uniform(source.model)
    fresh = FreshAdapter(
        weights=[TARGETS[target] for target in config.lora_targets],
        rank=config.lora_rank or 0,
        scale=config.lora_scale,
        variant=config.lora_variant or "lora",
        seed=config.seed,
    )
    return fresh.build(source, layers)


def adapter_shapes(config: TrainConfig, model: ModelConfig) -> "AdapterShapes":
    """Returns the shapes of the adapters that a run trains; none if it trains weights.

    Args:
        config: The settings of the run, as `with_adapter` returns them.
        model: The shape of the model.
    """
    from glm3cli.model.adapters import AdapterShape

    if config.lora_rank is None:
        return {}
    shape = AdapterShape(
        config.lora_rank,
        config.lora_scale,
        has_magnitude=config.lora_variant == "dora",
        has_start=config.lora_variant == "pissa",
    )
    layers = range(model.num_layers)
    return {(target, layer): shape for target in config.lora_targets for layer in layers}


def adapter_config(config: TrainConfig) -> "AdapterConfig | None":
    """Returns what adapter_config.json says about the adapter of a run; None without an adapter.

    Args:
        config: The settings of the run, as `with_adapter` returns them.
    """
    from glm3cli.checkpoint.adapter.config import AdapterConfig

    if config.lora_rank is None:
        return None
    return AdapterConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(config.model or "").absolute()),
        lora_dropout=config.lora_dropout,
        r=config.lora_rank,
        lora_alpha=config.lora_scale * config.lora_rank,
        use_rslora=config.lora_variant == "rslora",
        use_dora=config.lora_variant == "dora",
    )
