"""Checks that a run fits into its devices before the model is built, and names a plan that would.

A plan fits if its predicted peak leaves a tenth of the memory free (plan/memory.py: HEADROOM).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from glm3cli.config.model import ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.errors import ConfigError
from glm3cli.plan.memory import HEADROOM
from glm3cli.plan.search import fits, flags, gib, least_recomputing, none_fits, peak_of, search

if TYPE_CHECKING:
    from glm3cli.device.kernels import SavedForBackward


def saved_by_kernels(config: TrainConfig) -> "SavedForBackward":
    """Returns what kernels save for the backward pass on the device that is planned for.

    That device is --chip's in a dry run that plans for a chip or a memory size, and else the
    device that the run would start on.

    Raises:
        ConfigError: The chip is not known.
    """
    from glm3cli.device import DEVICES, find  # imports torch: only those wait who ask
    from glm3cli.device.catalog import find_chip
    from glm3cli.device.choice import saved_without

    if config.dry_run and (config.chip or config.device_memory):
        kind = find_chip(config.chip).kind
    else:
        kind = find() if config.device == "auto" else config.device
    return saved_without(DEVICES[kind].saved_for_backward, config.without_kernel)


def check_memory(config: TrainConfig, model: ModelConfig) -> None:
    """Checks that a run fits into --device-memory, if that is given.

    Raises:
        ConfigError: It doesn't; the hint has a parallel plan that fits.
    """
    memory = config.device_bytes
    if memory is None:
        return
    kernels = saved_by_kernels(config)
    if not fits(peak_of(config, model, kernels), memory):
        short = shortage(config, model, kernels, memory)
        raise ConfigError(short, way_out(config, model, kernels, memory))


def check_device(
    config: TrainConfig,
    model: ModelConfig,
    kernels: "SavedForBackward",
    memory_left: Callable[[int], int],
) -> str | None:
    """Checks that a run fits into the device that is here, unless --device-memory is given.

    Args:
        config: The run's settings.
        model: The model's shape.
        kernels: What the device's kernels save for the backward pass.
        memory_left: Returns the bytes of the device that a number of process groups leaves.

    Returns:
        A warning if the run fits but leaves less than the headroom free, else None.

    Raises:
        ConfigError: The run needs more than the memory; the hint has a parallel plan that fits.
    """
    memory = memory_left(config.num_groups)
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
    """Returns the sentence that a run needs more than a device with `memory` bytes can give."""
    peak = peak_of(config, model, kernels)
    return (
        f"{flags(config)} needs {gib(peak)} of a device, more than {1 - HEADROOM:.0%} of its "
        f"{gib(memory)}"
    )


def way_out(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", memory: int
) -> str:
    """Returns the advice to use the nearest parallel plan that fits into `memory` bytes.

    That is the same plan with more layers recomputed, or else the fastest one that fits; if none
    does, the advice says by how much the smallest misses.
    """
    from glm3cli.device.catalog import find_chip

    same = least_recomputing(config, model, kernels, memory)
    if fits(peak_of(same, model, kernels), memory):
        return f"use {flags(same)}"
    found = search(config, model, kernels, memory, find_chip(config.chip))
    if found.fitting:
        return f"use {flags(found.fitting[0].config)}"
    return f"{none_fits(found)}; use more devices, or shorter sequences"
