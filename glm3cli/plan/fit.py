"""Whether a run fits into its devices, and what would; said before the model is built."""

from typing import TYPE_CHECKING

from glm3cli.config.model import ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.errors import ConfigError
from glm3cli.plan.memory import HEADROOM
from glm3cli.plan.search import fits, flags, gib, least_recomputing, none_fits, peak_of, search

if TYPE_CHECKING:
    from glm3cli.device.kernels import SavedForBackward


def saved_by_kernels(config: TrainConfig) -> "SavedForBackward":
    """What the kernels keep of the device that is planned for: --chip's, or the one here.

    Raises:
        ConfigError: The chip is not known.
    """
    from glm3cli.device import DEVICES, find  # imports torch: only those wait who ask
    from glm3cli.device.catalog import find_chip

    if config.dry_run and (config.chip or config.device_memory):
        return DEVICES[find_chip(config.chip).kind].saved_for_backward
    return DEVICES[find() if config.device == "auto" else config.device].saved_for_backward


def check_memory(config: TrainConfig, model: ModelConfig) -> None:
    """Checks that the run fits into --device-memory, where that is given.

    Raises:
        ConfigError: It doesn't; with a layout that does.
    """
    memory = config.device_bytes
    if memory is None:
        return
    kernels = saved_by_kernels(config)
    if not fits(peak_of(config, model, kernels), memory):
        short = shortage(config, model, kernels, memory)
        raise ConfigError(short, way_out(config, model, kernels, memory))


def check_device(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", memory: int
) -> str | None:
    """Checks that the run fits into the device that is here, unless --device-memory is given.

    Returns:
        A warning, where little or nothing of the device would stay free.

    Raises:
        ConfigError: The run can't fit; with a layout that does.
    """
    if config.device_bytes is not None or fits(peak_of(config, model, kernels), memory):
        return None
    short = shortage(config, model, kernels, memory)
    if peak_of(config, model, kernels) <= memory:
        return f"the memory may not last: {short}"
    raise ConfigError(
        short,
        f"{way_out(config, model, kernels, memory)}; --device-memory overrules what the device "
        "says",
    )


def shortage(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", memory: int
) -> str:
    """Says that the run doesn't fit, and by how much."""
    peak = peak_of(config, model, kernels)
    return (
        f"{flags(config)} needs {gib(peak)} of a device, more than {1 - HEADROOM:.0%} of its "
        f"{gib(memory)}"
    )


def way_out(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", memory: int
) -> str:
    """Names the nearest layout that fits: the same one recomputing more, or else the fastest."""
    from glm3cli.device.catalog import find_chip

    same = least_recomputing(config, model, kernels, memory)
    if fits(peak_of(same, model, kernels), memory):
        return f"use {flags(same)}"
    found = search(config, model, kernels, memory, find_chip(config.chip))
    if found.fitting:
        return f"use {flags(found.fitting[0].config)}"
    return f"{none_fits(found)}; use more devices, or shorter sequences"
