"""Builds what a run trains with: the model, the optimizer, the schedule, and the data loaders."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from glm3cli.checkpoint.adapter.transfer import load_adapter
from glm3cli.checkpoint.layouts.opening import open_at
from glm3cli.checkpoint.load import load_weights
from glm3cli.checkpoint.random import RandomSource
from glm3cli.checkpoint.source import WeightSource
from glm3cli.config.model import ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.data.prefixes import Blend
from glm3cli.data.samples.datasets import build_samples
from glm3cli.data.samples.loader import Loader, source_names
from glm3cli.data.samples.padding import Padding
from glm3cli.data.samples.spec import Dataset, DataSpec
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.device import require_active
from glm3cli.device.dtypes import TORCH_DTYPES
from glm3cli.model.build import build_chunks, transformer_config, unwrap
from glm3cli.model.dropout import AdapterDropout
from glm3cli.model.noise import EmbeddingNoise
from glm3cli.parallel.groups import Grid
from glm3cli.train.preferences.choose import choose_objective
from glm3cli.train.preferences.reference import Reference
from glm3cli.train.prepare import Prepared
from glm3cli.train.step import TrainStep
from glm3cli.train.weights.adapter import adapter_shapes, first_adapter
from glm3cli.train.weights.selection import freeze


@dataclass(frozen=True)
class TrainingParts:
    """What a run trains with on this rank.

    Attributes:
        tokenizer: The tokenizer that the data was encoded with.
        train_step: The model, the optimizer, the schedule and the objective.
        train: The loader of the samples to train on.
        valid: The loader of the samples to validate on; None where the run doesn't validate.
    """

    tokenizer: Tokenizer
    train_step: TrainStep
    train: Loader
    valid: Loader | None


def build_training(
    prepared: Prepared,
    blend: Blend,
    grid: Grid,
    *,
    with_weights: bool,
    reference: Reference | None = None,
) -> TrainingParts:
    """Builds what a run trains with on this rank; every rank must call it.

    Args:
        prepared: The checked training.
        blend: The data sets to train on.
        grid: This rank's place among the parallel groups.
        with_weights: Whether to load the weights to start from. Without, they are uninitialised,
            for a checkpoint of the run to fill.
        reference: What the objective compares the model with; None if it compares it with nothing.

    Raises:
        CheckpointError: The model or the reference can't be read.
        DataError: An index of the data is damaged, or a split has no document.
        StoppedError: The run was asked to stop while the reference looked at the data.
    """
    config, model = prepared.config, prepared.model
    tokenizer = Tokenizer.load(prepared.tokenizer)
    train, valid = _loaders(prepared, blend, tokenizer, grid)
    train_step = build_train_step(config, model, grid, source_names(blend.prefixes))
    if reference is not None:
        reads = [(train, config.train_iters * config.global_batch_size)]
        if valid is not None:
            reads.append((valid, config.eval_iters * config.global_batch_size))
        reference.provide(train_step, reads)
    # The checkpoints of a run that trains an adapter don't have the other weights.
    if with_weights or config.is_adapted:
        gpts = [unwrap(chunk) for chunk in train_step.chunks]
        source = starting_weights(prepared)
        load_weights(gpts, source, config, grid)
        if config.is_adapted:
            layers = config.layers_of_stage(model.num_layers, grid.pp_rank)
            load_adapter(gpts, first_adapter(config, source, layers), model, grid)
        # The optimizer's fp32 copies were made of the weights before they were loaded.
        train_step.optimizer.reload_model_params()
    return TrainingParts(tokenizer, train_step, train, valid)


def starting_weights(prepared: Prepared) -> WeightSource:
    """Returns the weights to start from: those of --model, or random ones."""
    if prepared.location is not None:
        return open_at(prepared.location)
    config = prepared.config
    return RandomSource(prepared.model, seed=config.seed, std=config.init_method_std)


def _loaders(
    prepared: Prepared, blend: Blend, tokenizer: Tokenizer, grid: Grid
) -> tuple[Loader, Loader | None]:
    """Returns the loaders of the samples to train and to validate on.

    Args:
        prepared: The checked training.
        blend: The data sets to read.
        tokenizer: The tokenizer that the data was encoded with.
        grid: This rank's place among the parallel groups.
    """
    config = prepared.config
    spec = DataSpec.of(config, blend, config.row_length, config.train_iters).with_instructions(
        config
    )
    train, valid = build_samples(prepared.kind, spec, tokenizer)
    load = partial(make_loader, config, prepared.model, grid, sources=blend.prefixes)
    return load(train), None if valid is None else load(valid)


def make_loader(
    config: TrainConfig,
    model: ModelConfig,
    grid: Grid,
    dataset: Dataset,
    sources: tuple[str, ...] = ("",),
) -> Loader:
    """Returns a loader that cuts the samples of a data set into this rank's micro-batches.

    Args:
        config: The settings of the run.
        model: The shape of the model.
        grid: This rank's place among the parallel groups.
        dataset: The samples.
        sources: The prefixes of the data sets that the samples come from.
    """
    return Loader(
        dataset=dataset,
        seq_length=config.row_length,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
        dp_rank=grid.dp_rank,
        dp_size=grid.dp_size,
        cp_rank=grid.cp_rank,
        cp_size=grid.cp_size,
        vocab_size=model.padded_vocab_size,
        device=require_active().torch_device(),
        sources=sources,
        padding=Padding(
            multiple=config.length_multiple if config.padding == "longest" else None,
            side=config.padding_side,
        ),
        noise=_noise_of_a_token(config, model),
        has_places=config.lora_dropout > 0,
        needs_all=config.needs_all_losses,
    )


def _noise_of_a_token(config: TrainConfig, model: ModelConfig) -> float | None:
    """Returns the size of NEFTune's noise in a sample of one token; None for no noise."""
    if config.neftune_alpha is None:
        return None
    return config.neftune_alpha / math.sqrt(model.hidden_size)


def build_train_step(
    config: TrainConfig, model: ModelConfig, grid: Grid, sources: Sequence[str] = ()
) -> TrainStep:
    """Builds the model, the optimizer and the schedule on this rank, with uninitialised weights.

    Args:
        config: The settings of the run.
        model: The shape of the model.
        grid: This rank's place among the parallel groups. The train step lets go of them when the
            grid is closed.
        sources: The names of the data sets, as the batches have them.
    """
    mcore = transformer_config(
        model,
        config,
        config.dtype,
        sequence_parallel=config.sequence_parallel,
        context_parallel_size=config.cp,
        deallocate_pipeline_outputs=require_active().stream_ordered,
        # With two stages, previous and next stage are the same rank, and batched messages of the
        # interleaved schedule would be matched in the wrong order.
        batch_p2p_comm=config.vpp == 1 and config.batched_messages,
        batch_p2p_sync=require_active().synchronizes_messages,
        overlap_p2p_comm=config.vpp > 1,
        # Micro-batches may have different lengths (see `pipeline`); megatron-core then refuses the
        # default way to send tokens to experts, which there are none of.
        variable_seq_lengths=config.pp > 1,
        moe_token_dispatcher_type="alltoall",
        **_recompute(config),
    )
    # With one data parallel rank there is nothing to spread: only copies of whole buffers.
    distributed = config.distributed_optimizer and grid.dp_size * grid.cp_size > 1
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather and distributed,
        use_distributed_optimizer=distributed,
    )
    bare = build_chunks(model, config, mcore, adapter_shapes(config, model))
    for chunk in bare:
        freeze(unwrap(chunk), config)
    chunks: list[torch.nn.Module] = [
        DistributedDataParallel(mcore, ddp, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(bare)
    ]
    optimizer = _optimizer(config, chunks, distributed=distributed)
    train_step = TrainStep(
        objective=choose_objective(config, grid, sources),
        chunks=chunks,
        optimizer=optimizer,
        scheduler=_scheduler(config, optimizer),
        grid=grid,
        noise=_noise(config, bare),
        dropout=_dropout(config, bare),
    )
    _connect(mcore, train_step, ddp)
    grid.closing.callback(train_step.close)
    return train_step


def _optimizer(config: TrainConfig, chunks: list[torch.nn.Module], *, distributed: bool) -> Any:
    """Builds megatron-core's optimizer of what trains.

    Args:
        config: The settings of the run.
        chunks: The model chunks of this rank, wrapped for data parallelism.
        distributed: Whether the optimizer's state is spread over the data parallel ranks.
    """
    settings = _optimizer_config(config, distributed=distributed)
    optimizer = get_megatron_optimizer(
        settings,
        chunks,
        config_overrides=_overrides(config, settings),
        use_gloo_process_groups=False,
    )
    _fuse_adamw(optimizer)
    return optimizer


def _noise(config: TrainConfig, chunks: list[torch.nn.Module]) -> EmbeddingNoise | None:
    """Attaches NEFTune's noise to the embedding, if this rank has it; None without the option."""
    if config.neftune_alpha is None:
        return None
    noise = EmbeddingNoise(config.seed)
    for gpt in map(unwrap, chunks):
        if gpt.pre_process:
            noise.attach(gpt.embedding)
    return noise


def _dropout(config: TrainConfig, chunks: list[torch.nn.Module]) -> AdapterDropout | None:
    """Makes adapters drop inputs in training; None without --lora-dropout."""
    if config.lora_dropout == 0:
        return None
    dropout = AdapterDropout(config.lora_dropout, config.seed)
    for chunk in chunks:
        dropout.attach(unwrap(chunk))
    return dropout


def _recompute(config: TrainConfig) -> dict[str, Any]:
    """Returns the options of megatron-core's TransformerConfig for --recompute."""
    if config.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": config.recompute_method,
            "recompute_num_layers": config.recompute_num_layers,
        }
    if config.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _optimizer_config(config: TrainConfig, *, distributed: bool) -> OptimizerConfig:
    """Returns megatron-core's settings of the optimizer, AdamW.

    Args:
        config: The settings of the run.
        distributed: Whether the optimizer's state is spread over the data parallel ranks.
    """
    return OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        params_dtype=TORCH_DTYPES[config.dtype],
        fp16=config.dtype == "fp16",
        bf16=config.dtype == "bf16",
        initial_loss_scale=config.initial_loss_scale,
        loss_scale_window=1000,
        hysteresis=2,
        use_distributed_optimizer=distributed,
        overlap_param_gather=config.overlap_param_gather and distributed,
    )


def _overrides(config: TrainConfig, settings: OptimizerConfig) -> dict[ParamKey, Any]:
    """Returns the settings of groups of weights that differ from the others'.

    These are norms, biases and lengths, which don't decay, and with LoRA+ the matrices B of
    adapters, which have a learning rate of their own.

    Args:
        config: The settings of the run.
        settings: Megatron-core's settings of the optimizer.
    """
    overrides = dict(get_standard_config_overrides(settings))
    if config.lora_plus is not None:
        ratio = config.lora_plus
        overrides[ParamKey(name="*.adapter.b")] = ParamGroupOverride(
            max_lr=config.lr * ratio, min_lr=config.min_lr * ratio
        )
    return overrides


def _fuse_adamw(optimizer: Any) -> None:
    """Makes torch's AdamW update a weight in one pass, or in several if the user wants that.

    Megatron-core has no option for it. An AdamW of another library stays as it is.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = require_active().fuses_adamw or None


def _connect(mcore: Any, train_step: TrainStep, ddp: DistributedDataParallelConfig) -> None:
    """Gives megatron-core's pipeline schedule the hooks that it calls.

    Args:
        mcore: The TransformerConfig of the model, through which the schedule finds the hooks.
        train_step: Has the optimizer that scales the losses, and finishes the gradients.
        ddp: The settings of DDP, which say whether gradients are reduced during the backward pass.
    """
    mcore.finalize_model_grads_func = train_step.finalize
    mcore.grad_scale_func = train_step.optimizer.scale_loss
    if ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in train_step.chunks]
        mcore.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]


def _scheduler(config: TrainConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Returns the schedule of the learning rate, which counts optimizer steps.

    Megatron-LM's counts samples (megatron/training/training.py, get_optimizer_param_scheduler). Of
    a run that goes on with another global batch size, the position would then be in samples of the
    old size, and the length in those of the new one.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_iters,
        lr_decay_steps=config.train_iters,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.train_iters,
        wd_incr_style="constant",
    )
