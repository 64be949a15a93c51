"""The plan of a run as text, from shapes alone: sizes, memory of each stage, and what fits."""

from typing import TYPE_CHECKING

from glm3cli.config.model import DTYPE_BYTES, ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.plan.fit import saved_by_kernels, shortage, way_out
from glm3cli.plan.memory import memory_of_stage
from glm3cli.plan.parameters import parameters_of_model
from glm3cli.plan.search import fits, peak_of, search, table

if TYPE_CHECKING:
    from glm3cli.device.kernels import SavedForBackward


def describe(config: TrainConfig, model: ModelConfig) -> str:
    """Describes a run: its model, ranks, batch, length, the memory of each stage, a checkpoint.

    Returns:
        Lines of text for `--dry-run`.

    Raises:
        ConfigError: The chip is not known.
    """
    kernels = saved_by_kernels(config)
    tokens = config.global_batch_size * config.row_length
    lines = [
        f"model: {model.num_parameters:,} parameters, {model.num_layers} layers",
        f"ranks: {config.world_size} = tp {config.tp} x pp {config.pp} x dp {config.dp}"
        + (f", {config.vpp} chunks per stage" if config.vpp > 1 else ""),
        f"step: {config.global_batch_size} samples in {config.num_microbatches} micro-batches of "
        f"{config.micro_batch_size} x {config.row_length} tokens per data parallel rank",
        f"run: {config.train_iters:,} steps, {config.train_iters * tokens:,} tokens"
        if config.train_iters
        else f"run: {config.epochs:g} epochs of data that isn't counted yet",
    ]
    lines += [_stage(config, model, kernels, pp_rank) for pp_rank in range(config.pp)]
    lines.append(f"checkpoint: {checkpoint_bytes(config, model) / 2**30:.2f} GiB")
    return "\n".join(lines)


def _stage(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward", pp_rank: int
) -> str:
    """Returns the line of text with the memory of one pipeline stage, part by part."""
    memory = memory_of_stage(config, model, kernels, pp_rank)
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "backward pass": memory.work + memory.buffers,
        "optimizer step": memory.step,
    }
    listed = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in parts.items())
    return f"stage {pp_rank}: {listed}; peak {memory.peak / 2**30:.2f} GiB in the {memory.at_peak}"


def advise(config: TrainConfig, model: ModelConfig) -> str:
    """Says whether a run fits into the device that is planned for, and lists the plans that do.

    Returns:
        Lines of text for `--dry-run`: a sentence if the run doesn't fit, then the table of the
        fastest parallel plans.

    Raises:
        ConfigError: The chip is not known.
    """
    from glm3cli.device.catalog import find_chip

    kernels = saved_by_kernels(config)
    found = search(config, model, kernels, config.device_bytes, find_chip(config.chip))
    lines = []
    if not fits(peak_of(config, model, kernels), found.memory):
        lines.append(
            f"does not fit: {shortage(config, model, kernels, found.memory)}; "
            + way_out(config, model, kernels, found.memory)
        )
    return "\n".join([*lines, table(found)])


def checkpoint_bytes(config: TrainConfig, model: ModelConfig) -> int:
    """Returns the bytes of one checkpoint of a run.

    It holds all weights, and for each trained one an fp32 copy and two fp32 moments. A run that
    trains an adapter saves that alone, and once more in PEFT's layout.
    """
    counts = parameters_of_model(config, model)
    weights = 2 * counts.trained if config.is_adapted else counts.total
    return weights * DTYPE_BYTES[config.dtype] + counts.trained * 12
