"""The search for parallel plans that fit into the devices, in the order of their predicted speed.

A parallel plan is a choice of tp, pp, vpp, cp, the micro-batch size, and the recomputation for the
same optimizer step. The tables that users see call it a layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from glm3cli.config.model import ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.errors import ConfigError
from glm3cli.plan.estimate import StepTime, predict
from glm3cli.plan.memory import HEADROOM, memory_of_stage

if TYPE_CHECKING:
    from glm3cli.device.catalog import Chip
    from glm3cli.device.kernels import SavedForBackward

_MICRO_BATCHES = (1, 2, 4, 8)
_ROWS = 12


@dataclass(frozen=True)
class ParallelPlan:
    """A parallel plan that fits into the devices.

    Attributes:
        config: The run's settings with the plan's sizes and recomputation.
        peak: Peak memory of a rank of the stage that needs most, in bytes.
        time: The predicted time of a step.
    """

    config: TrainConfig
    peak: int
    time: StepTime


@dataclass(frozen=True)
class Search:
    """The result of a search: all parallel plans of a run.

    Attributes:
        chip: The device that is planned for.
        memory: Memory of a device, in bytes.
        fitting: The plans that fit, the fastest first.
        others: The plans that don't fit, each with all layers recomputed, and their peaks in bytes;
            the smallest first.
    """

    chip: "Chip"
    memory: int
    fitting: list[ParallelPlan]
    others: list[tuple[int, TrainConfig]]


def peak_of(config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward") -> int:
    """Returns the peak memory of a rank of the stage that needs most, in bytes.

    Args:
        config: The parallel sizes, the batch, and what is recomputed.
        model: The model's shape.
        kernels: What the device's kernels save for the backward pass.
    """
    return max(memory_of_stage(config, model, kernels, rank).peak for rank in range(config.pp))


def fits(peak: int, memory: int) -> bool:
    """Returns whether a peak leaves the headroom of a device free; both in bytes."""
    return peak <= (1 - HEADROOM) * memory


def search(
    config: TrainConfig,
    model: ModelConfig,
    kernels: "SavedForBackward",
    memory: int | None,
    chip: "Chip",
) -> Search:
    """Tries every parallel plan, each with the least recomputation with which it fits.

    Args:
        config: The run's settings; its own parallel sizes are ignored.
        model: The model's shape.
        kernels: What the device's kernels save for the backward pass.
        memory: Memory of a device, in bytes; None stands for the chip's.
        chip: The device that is planned for.
    """
    memory = memory or chip.memory_bytes
    fitting, others = [], []
    for plan in _plans(config, model):
        chosen = least_recomputing(plan, model, kernels, memory)
        peak = peak_of(chosen, model, kernels)
        if fits(peak, memory):
            fitting.append(ParallelPlan(chosen, peak, predict(chosen, model, chip)))
        else:
            others.append((peak, chosen))
    fitting.sort(key=lambda plan: plan.time.seconds)
    others.sort(key=lambda other: other[0])
    return Search(chip, memory, fitting, others)


def _plans(config: TrainConfig, model: ModelConfig) -> Iterator[TrainConfig]:
    """Yields `config` with all parallel and micro-batch sizes that are possible.

    None of them recomputes anything.
    """
    ranks = config.world_size
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    chunks = range(1, model.num_layers + 1)
    for tp, pp, cp in product(sizes, sizes, sizes):
        if ranks % (tp * pp * cp):
            continue
        for vpp, micro_batch_size in product(chunks if pp > 1 else [1], _MICRO_BATCHES):
            plan = _changed(
                config,
                tp=tp,
                pp=pp,
                cp=cp,
                vpp=vpp,
                micro_batch_size=micro_batch_size,
                layers_per_stage=None,
                recompute="none",
            )
            if _is_possible(plan, model):
                yield plan


def _changed(config: TrainConfig, **values: Any) -> TrainConfig:
    """Returns a copy of the settings with other values, which are not checked."""
    return config.model_copy(update=values)


def _is_possible(config: TrainConfig, model: ModelConfig) -> bool:
    """Returns whether the model and the batch can be cut by the parallel sizes."""
    try:
        config.check_sizes(model)
    except ConfigError:
        return False
    return True


def least_recomputing(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", memory: int
) -> TrainConfig:
    """Returns `config` with the fewest recomputed layers with which it fits into `memory` bytes.

    If it doesn't fit at all, all layers are recomputed. `--recompute selective` is not tried: fused
    attention saves nothing that it could spare.
    """
    layers = len(config.layers_of(model.num_layers, 0))
    ways: list[dict[str, Any]] = [{"recompute": "none"}]
    ways += [
        {"recompute": "full", "recompute_method": "block", "recompute_num_layers": number}
        for number in range(1, layers)
    ]
    whole = {"recompute": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if not fits(peak_of(_changed(config, **whole), model, kernels), memory):
        return _changed(config, **whole)
    for way in ways:
        candidate = _changed(config, **way)
        if fits(peak_of(candidate, model, kernels), memory):
            return candidate
    return _changed(config, **whole)


def none_fits(found: Search) -> str:
    """Returns the sentence that no plan fits, and by how much the smallest one misses."""
    if not found.others:
        return "no layout is possible with this --global-batch-size"
    peak, config = found.others[0]
    missing = peak - (1 - HEADROOM) * found.memory
    return (
        f"none of {len(found.others)} layouts fits; the smallest, {flags(config)}, needs "
        f"{gib(peak)}, {gib(missing)} too much"
    )


def flags(config: TrainConfig) -> str:
    """Returns the command-line options that choose the parallel plan of `config`."""
    words = [f"--tp {config.tp}", f"--pp {config.pp}"]
    words += [f"--vpp {config.vpp}"] if config.vpp > 1 else []
    words += [f"--layers-per-stage {config.layers_per_stage}"] if config.layers_per_stage else []
    words += [f"--cp {config.cp}"] if config.cp > 1 else []
    words += [f"--micro-batch-size {config.micro_batch_size}"]
    if config.recompute != "none":
        words.append(f"--recompute {config.recompute}")
    if config.recompute == "full" and config.recompute_method == "block":
        words.append(
            f"--recompute-method block --recompute-num-layers {config.recompute_num_layers}"
        )
    return " ".join(words)


def table(found: Search) -> str:
    """Returns the table of the fastest plans that fit, as lines of text."""
    chip = found.chip
    lines = [
        f"layouts for {chip.name} with {gib(found.memory)}, of which {HEADROOM:.0%} stays free; "
        "speeds are predicted:"
    ]
    if not found.fitting:
        return f"{lines[0]}\n{none_fits(found)}"
    lines.append(
        " tp  pp vpp  cp  dp  sp  batch  recompute   worst stage  bubble  tokens/s/device    step"
    )
    lines += [_row(plan) for plan in found.fitting[:_ROWS]]
    more = len(found.fitting) - _ROWS
    if more > 0:
        lines.append(f"{more} more layouts fit")
    lines.append(f"{len(found.others)} layouts don't fit")
    return "\n".join(lines)


def _row(plan: ParallelPlan) -> str:
    """Returns the line of the table for one plan."""
    config, time = plan.config, plan.time
    parallel = "yes" if config.tp > 1 and config.sequence_parallel else "-"
    return (
        f"{config.tp:3} {config.pp:3} {config.vpp:3} {config.cp:3} {config.dp:3} {parallel:>3} "
        f"{config.micro_batch_size:6}  {_recompute(config):10} {gib(plan.peak):>12} "
        f"{time.bubble:7.1%} {time.tokens_per_second:16,.0f} {time.seconds:6.2f}s"
    )


def _recompute(config: TrainConfig) -> str:
    """Returns what a plan recomputes, as the table has it."""
    if config.recompute == "full" and config.recompute_method == "block":
        return f"block {config.recompute_num_layers}"
    return config.recompute


def gib(size: float) -> str:
    """Returns a number of bytes as text, such as 1.50 GiB."""
    return f"{size / 2**30:.2f} GiB"
