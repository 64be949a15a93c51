"""`choose`: the parallel plan of `--auto-layout`, the fastest that fits into the devices.

Every rank, and the process that starts them, chooses by itself, from the settings and the
description of a device alone; so all of them choose the same.
"""

from dataclasses import dataclass

from glm3cli.config.model import ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.errors import ConfigError
from glm3cli.plan.search import ParallelPlan, Search, flags, gib, none_fits, search


@dataclass(frozen=True)
class Choice:
    """A parallel plan that was chosen for a run.

    Attributes:
        config: The run's settings with the plan's sizes and recomputation, and without
            --auto-layout; whoever reads them again gets this plan.
        why: The sentence that says which plan it is, and why it was chosen.
    """

    config: TrainConfig
    why: str


def choose(config: TrainConfig, model: ModelConfig) -> Choice:
    """Chooses tp, pp, vpp, cp, the micro-batch size, and the recomputation of a run.

    Those that the settings have are replaced. The devices are those of --chip, with the memory of
    --device-memory if that is given; else those of the dry run, or those that the run starts on.

    Args:
        config: The run's settings, with --auto-layout.
        model: The model's shape.

    Raises:
        ConfigError: No plan fits, or the chip is not known.
        DeviceError: The speed of the device that is here isn't known.
    """
    from glm3cli.device import DEVICES, find  # imports torch: only those wait who ask
    from glm3cli.device.catalog import find_chip

    kind = find() if config.device == "auto" else config.device
    if config.chip or config.plans_elsewhere:
        chip = find_chip(config.chip)
        kind = chip.kind if config.dry_run else kind
    else:
        chip = DEVICES[kind].described(config.num_local_ranks)
    kernels = DEVICES[kind].saved_for_backward
    found = search(config, model, kernels, config.device_bytes, chip)
    if not found.fitting:
        raise ConfigError(
            f"--auto-layout: {none_fits(found)}",
            "use more devices, shorter sequences, or another --global-batch-size",
        )
    # The rest of a dry run goes by the same chip; a run takes none without --auto-layout.
    named = (config.chip or chip.name) if config.plans_elsewhere else None
    chosen = found.fitting[0].config.model_copy(update={"auto_layout": False, "chip": named})
    return Choice(chosen, _why(found, config))


def _why(found: Search, given: TrainConfig) -> str:
    """Returns the sentence about the fastest plan: its figures, and those of the next."""
    best = found.fitting[0]
    chip, memory = found.chip.name, gib(found.memory)
    plans = f"{len(found.fitting)} layouts that fit into {given.world_size} x {chip} with {memory}"
    sentence = (
        f"--auto-layout takes {flags(best.config)}: of {plans}, it is predicted to be the fastest, "
        f"with {_speed(best)} and {gib(best.peak)} at the peak"
    )
    if len(found.fitting) > 1:
        next_best = found.fitting[1]
        sentence += f"; next is {flags(next_best.config)} with {_speed(next_best)}"
    if found.others:
        sentence += f"; {len(found.others)} don't fit"
    return sentence


def _speed(plan: ParallelPlan) -> str:
    """Returns the predicted speed of a plan as text."""
    return f"{plan.time.seconds:.3g} s a step ({plan.time.tokens_per_second:,.0f} tokens/s/device)"
