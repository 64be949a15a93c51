"""`TrainConfig`: all options of a training run, in one class per concern.

`TrainConfig` inherits from all of these classes, so that its fields are flat, as in run.yaml.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag, Settings
from glm3cli.config.model import DType, ModelConfig
from glm3cli.config.parallel import PANEL as PARALLEL
from glm3cli.config.parallel import ParallelConfig
from glm3cli.config.planning import PlanOptions
from glm3cli.config.reporting import ReportOptions
from glm3cli.errors import ConfigError

MODEL, DATA, OPTIMIZER, RUN = "Model", "Data", "Optimizer", "Run"


class StartOptions(Settings):
    """The options for the weights that a training starts from, and for their type."""

    model: Annotated[Path | None, Flag(panel=MODEL)] = Field(
        default=None, description="Model folder in any layout, or a training run's folder."
    )
    from_scratch: Annotated[bool, Flag(panel=MODEL)] = Field(
        default=False, description="Start from random weights of the shape --model-config."
    )
    shape: Annotated[str | None, Flag(name="model_config", panel=MODEL, metavar="6b|tiny|FILE")] = (
        Field(default=None, description="Shape for --from-scratch: a preset or a config.json.")
    )
    init_method_std: Annotated[float, Flag(panel=MODEL)] = Field(
        default=0.01, gt=0, description="Standard deviation of random weights."
    )
    tokenizer: Annotated[Path | None, Flag(panel=MODEL)] = Field(
        default=None, description="Folder or tokenizer.model; default: the one in --model."
    )
    dtype: Annotated[DType, Flag(panel=MODEL)] = Field(
        default="bf16", description="Type of weights and activations; the optimizer keeps fp32."
    )

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if self.from_scratch == (self.model is not None):
            raise ValueError("give either --model MODEL or --from-scratch --model-config SHAPE")
        if self.from_scratch and self.shape is None:
            raise ValueError("--from-scratch needs --model-config 6b, tiny, or a config.json")
        if not self.from_scratch and self.shape is not None:
            raise ValueError(
                "--model-config goes with --from-scratch; --model brings its own shape"
            )
        return self


class DataOptions(Settings):
    """The options for the training data, and for how much of it a step takes."""

    data: Annotated[list[str], Flag(aliases=("--data-path",), panel=DATA)] = Field(
        min_length=1,
        description="Prefix of preprocessed files, or a raw file or folder (parquet, jsonl, json, "
        "csv, arrow, txt); repeat as WEIGHT:PREFIX to blend, or give a YAML file with a list.",
    )
    data_cache: Annotated[Path | None, Flag(panel=DATA)] = Field(
        default=None,
        description="Folder for raw --data once it is preprocessed; default: data in --save.",
    )
    split: Annotated[str, Flag(panel=DATA)] = Field(
        default="949,50,1",
        pattern=r"^\d+(\.\d+)?(,\d+(\.\d+)?){2}$",
        description="Proportions of training, validation, and test documents.",
    )
    seq_length: Annotated[int, Flag(panel=DATA)] = Field(
        default=2048, ge=2, description="Tokens of one sample."
    )
    micro_batch_size: Annotated[int, Flag(panel=DATA)] = Field(
        default=1, ge=1, description="Samples that one rank runs at once."
    )
    global_batch_size: Annotated[int, Flag(panel=DATA)] = Field(
        default=8, ge=1, description="Samples of one optimizer step, over all ranks."
    )
    shared_storage: Annotated[bool, Flag(panel=DATA)] = Field(
        default=True, description="Accepted; every machine looks at its own disk anyway."
    )


class OptimizerOptions(Settings):
    """The options of AdamW, of the learning-rate schedule, and of fp16's loss scale."""

    train_iters: Annotated[int, Flag(panel=OPTIMIZER)] = Field(ge=1, description="Optimizer steps.")
    lr: Annotated[float, Flag(panel=OPTIMIZER)] = Field(
        default=1e-5, gt=0, description="Highest learning rate."
    )
    min_lr: Annotated[float, Flag(panel=OPTIMIZER)] = Field(
        default=0.0, ge=0, description="Learning rate at the end of the decay."
    )
    lr_decay_style: Annotated[
        Literal["constant", "linear", "cosine", "inverse-square-root"], Flag(panel=OPTIMIZER)
    ] = Field(default="cosine", description="Shape of the decay.")
    lr_warmup_fraction: Annotated[float | None, Flag(panel=OPTIMIZER)] = Field(
        default=None, ge=0, lt=1, description="Share of the steps with a rising learning rate."
    )
    lr_warmup_iters: Annotated[int, Flag(panel=OPTIMIZER)] = Field(
        default=0, ge=0, description="Steps with a rising learning rate."
    )
    weight_decay: Annotated[float, Flag(panel=OPTIMIZER)] = Field(
        default=0.1, ge=0, description="Decoupled weight decay; norms and biases are exempt."
    )
    clip_grad: Annotated[float, Flag(panel=OPTIMIZER)] = Field(
        default=1.0, ge=0, description="Largest gradient norm; 0 doesn't clip."
    )
    adam_beta1: Annotated[float, Flag(panel=OPTIMIZER)] = Field(
        default=0.9, ge=0, lt=1, description="Decay of the first moment."
    )
    adam_beta2: Annotated[float, Flag(panel=OPTIMIZER)] = Field(
        default=0.95, ge=0, lt=1, description="Decay of the second moment."
    )
    adam_eps: Annotated[float, Flag(panel=OPTIMIZER)] = Field(
        default=1e-8, gt=0, description="Added to the root of the second moment."
    )
    initial_loss_scale: Annotated[float, Flag(panel=OPTIMIZER)] = Field(
        default=4096.0, ge=1, description="First loss scale of fp16 training."
    )

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"--min-lr {self.min_lr} is above --lr {self.lr}")
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            raise ValueError("give --lr-warmup-fraction or --lr-warmup-iters, not both")
        if self.lr_warmup_iters >= self.train_iters:
            raise ValueError(
                f"--lr-warmup-iters {self.lr_warmup_iters} must be below --train-iters "
                f"{self.train_iters}"
            )
        return self


class MegatronOptions(Settings):
    """The options by which megatron-core saves memory and overlaps communication."""

    sequence_parallel: Annotated[bool, Flag(panel=PARALLEL)] = Field(
        default=True, description="Split activations between tensor parallel layers (tp > 1)."
    )
    distributed_optimizer: Annotated[
        bool, Flag(aliases=("--use-distributed-optimizer",), panel=PARALLEL)
    ] = Field(default=True, description="Spread optimizer state over data parallel ranks (dp > 1).")
    overlap_grad_reduce: Annotated[bool, Flag(panel=PARALLEL)] = Field(
        default=False, description="Reduce gradients while the backward pass runs."
    )
    overlap_param_gather: Annotated[bool, Flag(panel=PARALLEL)] = Field(
        default=False, description="Gather weights while the forward pass runs."
    )
    recompute: Annotated[Literal["none", "selective", "full"], Flag(panel=PARALLEL)] = Field(
        default="none", description="Recompute attention, or whole layers, in the backward pass."
    )
    recompute_method: Annotated[Literal["uniform", "block"], Flag(panel=PARALLEL)] = Field(
        default="uniform",
        description="Of --recompute full: keep the input of every group of --recompute-num-layers "
        "layers (uniform), or recompute that many layers of a stage and no more (block).",
    )
    recompute_num_layers: Annotated[int, Flag(panel=PARALLEL)] = Field(
        default=1, ge=1, description="Layers of --recompute-method."
    )

    @model_validator(mode="after")
    def _check_overlap(self) -> Self:
        if self.overlap_param_gather and not (
            self.overlap_grad_reduce and self.distributed_optimizer
        ):
            raise ValueError(
                "--overlap-param-gather needs --overlap-grad-reduce and --distributed-optimizer"
            )
        return self


class RunOptions(Settings):
    """The options for a run's folder, its checkpoints, its validation, and its log."""

    save: Annotated[Path, Flag(panel=RUN)] = Field(description="Folder of the run.")
    save_interval: Annotated[int | None, Flag(panel=RUN)] = Field(
        default=None, ge=1, description="Steps between checkpoints; one is written at the end too."
    )
    async_save: Annotated[bool, Flag(panel=RUN)] = Field(
        default=True, description="Write checkpoints while training goes on."
    )
    exit_duration: Annotated[float | None, Flag(panel=RUN)] = Field(
        default=None,
        gt=0,
        description="Minutes after which the run saves and ends (exit code 143).",
    )
    max_skipped: Annotated[int, Flag(panel=RUN)] = Field(
        default=50, ge=1, description="Skipped steps in a row (overflow, NaN) that end the run."
    )
    rollback_on_nan: Annotated[bool, Flag(panel=RUN)] = Field(
        default=False,
        description="Where a loss or gradient is NaN, go back to the newest checkpoint and leave "
        "the batch out.",
    )
    keep_last: Annotated[int | None, Flag(panel=RUN)] = Field(
        default=None, ge=1, description="Keep only this many newest checkpoints."
    )
    resume: Annotated[str, Flag(panel=RUN, metavar="auto|never|CKPT")] = Field(
        default="auto", description="auto continues the run in --save if it has a checkpoint."
    )
    deterministic: Annotated[bool, Flag(panel=RUN)] = Field(
        default=False,
        description="The same bits in every run at the same parallel sizes; slower on some chips.",
    )
    seed: Annotated[int, Flag(panel=RUN)] = Field(
        default=1234, ge=0, description="Seed of random weights and of the data order."
    )
    eval_interval: Annotated[int | None, Flag(panel=RUN)] = Field(
        default=None, ge=1, description="Steps between validations."
    )
    eval_iters: Annotated[int, Flag(panel=RUN)] = Field(
        default=10, ge=1, description="Batches of one validation."
    )
    log_interval: Annotated[int, Flag(panel=RUN)] = Field(
        default=1, ge=1, description="Steps between log lines; metrics.jsonl has every step."
    )


class TrainConfig(
    ReportOptions,
    RunOptions,
    OptimizerOptions,
    MegatronOptions,
    ParallelConfig,
    DataOptions,
    StartOptions,
    PlanOptions,
):
    """All options of a training run: those of `glm3 pretrain` and of `glm3 finetune`."""

    @property
    def dp(self) -> int:
        """Data parallel size: number of model copies, which run different micro-batches."""
        return self.world_size // (self.model_parallel_size * self.cp)

    @property
    def num_microbatches(self) -> int:
        """Number of micro-batches that each model copy runs per optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    @property
    def warmup_iters(self) -> float:
        """Number of optimizer steps with a rising learning rate; may have a fraction."""
        if self.lr_warmup_fraction is not None:
            return self.lr_warmup_fraction * self.train_iters
        return self.lr_warmup_iters

    def trains(self, weight: str) -> bool:
        """Returns whether a weight is trained: every weight is.

        This is decided here alone. The model freezes the others before DDP wraps it, so that they
        have neither gradients nor optimizer state; the predicted memory and the size of a
        checkpoint follow from the same answer.

        Args:
            weight: The weight's logical name, as in `checkpoint/names.py`.
        """
        return True

    def check_sizes(self, model: ModelConfig) -> None:
        """Checks the parallel sizes, batch sizes and sequence length against `model` and the ranks.

        Raises:
            ConfigError: A size doesn't divide another, or an option doesn't fit the model.
        """
        self.check_fits(model)
        self.check_world(self.world_size)
        self._check_context(model)
        self._check_profiled_steps()
        self._check_mc2(model)
        step = self.micro_batch_size * self.dp
        if self.global_batch_size % step:
            raise ConfigError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of "
                f"--micro-batch-size {self.micro_batch_size} x data parallel size {self.dp}",
                f"use a multiple of {step}",
            )
        parts = (self.tp if self.sequence_parallel else 1) * self.cp
        if self.seq_length % parts:
            raise ConfigError(
                f"--seq-length {self.seq_length} is not divisible by --tp {self.tp}"
                + (f" x --cp {self.cp}" if self.cp > 1 else ""),
                f"use a multiple of {parts}"
                + (", or --no-sequence-parallel" if self.tp > 1 else ""),
            )
        if self.vpp > 1 and self.num_microbatches % self.pp:
            raise ConfigError(
                f"--vpp {self.vpp} needs a multiple of --pp {self.pp} micro-batches per step, "
                f"not {self.num_microbatches}",
                f"use a --global-batch-size that is a multiple of {step * self.pp}",
            )

    def _check_profiled_steps(self) -> None:
        if self.profile_steps and self.profile_steps[-1] > self.train_iters:
            raise ConfigError(
                f"--profile {self.profile} goes beyond --train-iters {self.train_iters}",
                f"give steps from 1 to {self.train_iters}",
            )

    def _check_mc2(self, model: ModelConfig) -> None:
        """Checks --mc2 against its operators' limits, as the device layer's kernels name them."""
        if not self.mc2:
            return
        if self.tp not in (2, 4, 8) or not self.sequence_parallel or self.dtype == "fp32":
            raise ConfigError(
                f"--mc2 with --tp {self.tp}, --dtype {self.dtype}"
                + ("" if self.sequence_parallel else ", --no-sequence-parallel")
                + ": it is for 2, 4 or 8 tensor parallel ranks, 16 bits, and sequence parallelism",
                "leave --mc2 out, or change these",
            )
        sizes = (model.hidden_size, model.query_size // self.tp, model.ffn_hidden_size // self.tp)
        if not 256 <= min(sizes) <= max(sizes) < 65535:
            raise ConfigError(
                f"--mc2: its matrix products sum over 256 to 65,534 numbers, these over {sizes}",
                "leave --mc2 out, or use a smaller --tp",
            )

    def _check_context(self, model: ModelConfig) -> None:
        """Checks --cp: Ulysses shares attention heads and query groups over the cp ranks."""
        ranks = self.model_parallel_size * self.cp
        if self.world_size % ranks:
            raise ConfigError(
                f"{self.world_size} rank(s) can't hold --tp {self.tp} x --pp {self.pp} x --cp "
                f"{self.cp} = {ranks}",
                f"start a multiple of {ranks} ranks, e.g. --nproc {ranks}",
            )
        heads = model.num_attention_heads // self.tp
        groups = max(1, model.num_query_groups // self.tp)
        if self.cp % groups and groups % self.cp:
            raise ConfigError(
                f"--cp {self.cp} and the {groups} query groups of a tensor parallel rank: one must "
                "divide the other",
                f"use a --cp that is a multiple of {groups}",
            )
        if heads % self.cp:
            raise ConfigError(
                f"--cp {self.cp} does not divide the {heads} attention heads of a tensor parallel "
                "rank",
                "use a --cp that divides num_attention_heads / tp",
            )
