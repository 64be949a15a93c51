"""`--dry-run`: what a run would be, from shapes alone; imports nothing heavy."""

from glm3cli.config.model import ModelConfig
from glm3cli.config.training import TrainConfig

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def parameters_of_rank(config: TrainConfig, model: ModelConfig, pp_rank: int) -> int:
    """Weights on one tensor parallel rank of stage `pp_rank`."""
    h, tp = model.hidden_size, config.tp
    rows = (model.query_size + 2 * model.kv_size) // tp
    layer = 2 * h + rows * (h + 1) + (model.query_size * h + 3 * model.ffn_hidden_size * h) // tp
    chunks = range(config.vpp)
    layers = sum(len(config.layers_of(model.num_layers, pp_rank, chunk)) for chunk in chunks)
    vocab = model.padded_vocab_size * h // tp
    first, last = pp_rank == 0, pp_rank == config.pp - 1
    return layers * layer + first * vocab + last * (vocab + h)


def memory_of_rank(config: TrainConfig, model: ModelConfig, pp_rank: int) -> dict[str, int]:
    """Bytes of weights, gradients, and optimizer state on one rank of stage `pp_rank`.

    Gradients are fp32. The optimizer holds two fp32 moments, and an fp32 copy of 16-bit weights;
    the distributed optimizer shares them out over the data parallel ranks.
    """
    count = parameters_of_rank(config, model, pp_rank)
    shares = config.dp if config.distributed_optimizer else 1
    # The distributed optimizer keeps fp32 weights in place: it has no second copy of them.
    copy = 0 if config.dtype == "fp32" else 4
    return {
        "weights": count * _BYTES[config.dtype],
        "gradients": count * 4,
        "optimizer": count * (8 + copy) // shares,
    }


def describe(config: TrainConfig, model: ModelConfig) -> str:
    """The resolved plan as lines of text."""
    tokens = config.global_batch_size * config.seq_length
    lines = [
        f"model: {model.num_parameters:,} parameters, {model.num_layers} layers",
        f"ranks: {config.world_size} = tp {config.tp} x pp {config.pp} x dp {config.dp}"
        + (f", {config.vpp} chunks per stage" if config.vpp > 1 else ""),
        f"step: {config.global_batch_size} samples in {config.num_microbatches} micro-batches of "
        f"{config.micro_batch_size} x {config.seq_length} tokens per data parallel rank",
        f"run: {config.train_iters:,} steps, {config.train_iters * tokens:,} tokens",
    ]
    for pp_rank in range(config.pp):
        parts = memory_of_rank(config, model, pp_rank)
        told = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in parts.items())
        total = sum(parts.values()) / 2**30
        lines.append(f"stage {pp_rank}: {told}, together {total:.2f} GiB without activations")
    lines.append(f"checkpoint: {checkpoint_bytes(config, model) / 2**30:.2f} GiB")
    return "\n".join(lines)


def checkpoint_bytes(config: TrainConfig, model: ModelConfig) -> int:
    """Bytes of one checkpoint: weights, moments, and the fp32 copy of 16-bit weights."""
    copy = 0 if config.dtype == "fp32" else 4
    return model.num_parameters * (_BYTES[config.dtype] + 8 + copy)
