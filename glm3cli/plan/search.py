"""Which layouts fit into the devices, and which of them would be the fastest."""

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
    """A way to run the same step.

    Attributes:
        peak: Bytes on a rank of the stage that needs most.
    """

    config: TrainConfig
    peak: int
    time: StepTime


@dataclass(frozen=True)
class Search:
    """All layouts of a run.

    Attributes:
        memory: Bytes of a device.
        fitting: Those that fit, the fastest first.
        others: Peaks of those that don't, each at its smallest, the smallest first.
    """

    chip: "Chip"
    memory: int
    fitting: list[ParallelPlan]
    others: list[tuple[int, TrainConfig]]


def peak_of(config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward") -> int:
    """Bytes on a rank of the stage that needs most, with kernels that keep what is told."""
    return max(memory_of_stage(config, model, kernels, rank).peak for rank in range(config.pp))


def fits(peak: int, memory: int) -> bool:
    """Whether a peak leaves the headroom of a device free."""
    return peak <= (1 - HEADROOM) * memory


def search(
    config: TrainConfig,
    model: ModelConfig,
    kernels: "SavedForBackward",
    memory: int | None,
    chip: "Chip",
) -> Search:
    """Tries every layout with the least recomputation that it fits with."""
    memory = memory or chip.memory_bytes
    fitting, others = [], []
    for layout in _layouts(config, model):
        chosen = least_recomputing(layout, model, kernels, memory)
        peak = peak_of(chosen, model, kernels)
        if fits(peak, memory):
            fitting.append(ParallelPlan(chosen, peak, predict(chosen, model, chip)))
        else:
            others.append((peak, chosen))
    fitting.sort(key=lambda layout: layout.time.seconds)
    others.sort(key=lambda other: other[0])
    return Search(chip, memory, fitting, others)


def _layouts(config: TrainConfig, model: ModelConfig) -> Iterator[TrainConfig]:
    """All sizes of the axes and of the micro-batch that `config` allows, recomputing nothing."""
    ranks = config.world_size
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    chunks = range(1, model.num_layers + 1)
    for tp, pp, cp in product(sizes, sizes, sizes):
        if ranks % (tp * pp * cp):
            continue
        for vpp, micro_batch_size in product(chunks if pp > 1 else [1], _MICRO_BATCHES):
            layout = _changed(
                config,
                tp=tp,
                pp=pp,
                cp=cp,
                vpp=vpp,
                micro_batch_size=micro_batch_size,
                layers_per_stage=None,
                recompute="none",
            )
            if _is_possible(layout, model):
                yield layout


def _changed(config: TrainConfig, **values: Any) -> TrainConfig:
    return config.model_copy(update=values)


def _is_possible(config: TrainConfig, model: ModelConfig) -> bool:
    try:
        config.check_sizes(model)
    except ConfigError:
        return False
    return True


def least_recomputing(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", memory: int
) -> TrainConfig:
    """The layout of `config` with the fewest recomputed layers that it fits with; else, with all.

    `--recompute selective` is not among them: a fused attention keeps nothing that it could save.
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
    """By how much the smallest layout misses."""
    if not found.others:
        return "no layout is possible with this --global-batch-size"
    peak, config = found.others[0]
    missing = peak - (1 - HEADROOM) * found.memory
    return (
        f"none of {len(found.others)} layouts fits; the smallest, {flags(config)}, needs "
        f"{gib(peak)}, {gib(missing)} too much"
    )


def flags(config: TrainConfig) -> str:
    """The options that choose this layout."""
    told = [f"--tp {config.tp}", f"--pp {config.pp}"]
    told += [f"--vpp {config.vpp}"] if config.vpp > 1 else []
    told += [f"--layers-per-stage {config.layers_per_stage}"] if config.layers_per_stage else []
    told += [f"--cp {config.cp}"] if config.cp > 1 else []
    told += [f"--micro-batch-size {config.micro_batch_size}"]
    if config.recompute != "none":
        told.append(f"--recompute {config.recompute}")
    if config.recompute == "full" and config.recompute_method == "block":
        told.append(
            f"--recompute-method block --recompute-num-layers {config.recompute_num_layers}"
        )
    return " ".join(told)


def table(found: Search) -> str:
    """The fastest layouts that fit, as lines of text."""
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
    lines += [_row(layout) for layout in found.fitting[:_ROWS]]
    more = len(found.fitting) - _ROWS
    if more > 0:
        lines.append(f"{more} more layouts fit")
    lines.append(f"{len(found.others)} layouts don't fit")
    return "\n".join(lines)


def _row(layout: ParallelPlan) -> str:
    config, time = layout.config, layout.time
    parallel = "yes" if config.tp > 1 and config.sequence_parallel else "-"
    return (
        f"{config.tp:3} {config.pp:3} {config.vpp:3} {config.cp:3} {config.dp:3} {parallel:>3} "
        f"{config.micro_batch_size:6}  {_recompute(config):10} {gib(layout.peak):>12} "
        f"{time.bubble:7.1%} {time.tokens_per_second:16,.0f} {time.seconds:6.2f}s"
    )


def _recompute(config: TrainConfig) -> str:
    if config.recompute == "full" and config.recompute_method == "block":
        return f"block {config.recompute_num_layers}"
    return config.recompute


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB"
