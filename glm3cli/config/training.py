"""`TrainConfig`: all options of a training run, put together from the classes in `options`.

`TrainConfig` inherits from all of these classes, so that its fields are flat, as in run.yaml.
"""

import math
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag, unknown_key
from glm3cli.config.model import ModelConfig
from glm3cli.config.options.batches import BatchOptions
from glm3cli.config.options.data import DataOptions
from glm3cli.config.options.lora import LoraOptions
from glm3cli.config.options.loss import LossOptions
from glm3cli.config.options.megatron import MegatronOptions
from glm3cli.config.options.optimizer import OPTIMIZER, OptimizerOptions
from glm3cli.config.options.partial import PartialOptions
from glm3cli.config.options.planning import PlanOptions
from glm3cli.config.options.preference import PreferenceOptions
from glm3cli.config.options.reporting import ReportOptions
from glm3cli.config.options.run import IDENTITY, RunOptions
from glm3cli.config.options.start import StartOptions
from glm3cli.config.options.tuning import TuningOptions
from glm3cli.config.parallel import ParallelConfig
from glm3cli.errors import ConfigError


class TrainConfig(
    ReportOptions,
    RunOptions,
    OptimizerOptions,
    PartialOptions,
    LoraOptions,
    MegatronOptions,
    ParallelConfig,
    TuningOptions,
    LossOptions,
    BatchOptions,
    DataOptions,
    PreferenceOptions,
    StartOptions,
    PlanOptions,
):
    """The options of both trainings, `glm3 pretrain` and `glm3 finetune`.

    An option that one of them alone has is a field here as well, with a default that changes
    nothing, so that the rest of the code needn't ask which command it serves.
    """

    @model_validator(mode="after")
    def _check_allowed(self) -> Self:
        options = [str(self.flag_of(field).name) for field in self.option_fields()]
        known = dict.fromkeys([*IDENTITY, *options])
        for name in self.allow_changed:
            if name not in known:
                raise ValueError(f"--allow-changed {name}: {unknown_key(name, known)}")
        return self

    @property
    def dp(self) -> int:
        """Data parallel size: number of model copies, which run different micro-batches."""
        return self.world_size // (self.model_parallel_size * self.cp)

    @property
    def num_groups(self) -> int:
        """Number of process groups of a rank in which several ranks exchange something.

        They are those of tp, pp, cp, and dp with cp; of tp with pp, which adds up the gradient's
        norm; and of all ranks.
        """
        sizes = (self.tp, self.pp, self.cp, self.dp * self.cp)
        both = (self.model_parallel_size, self.world_size)
        return sum(size > 1 for size in (*sizes, *both))

    @property
    def cache_folder(self) -> Path:
        """The folder for what is made of the data before a training."""
        return self.data_cache or self.save / "data"

    @property
    def row_length(self) -> int:
        """Largest number of positions of a sample: seq_length, or twice that for a pair."""
        return self.seq_length * (2 if self.is_paired else 1)

    @property
    def num_microbatches(self) -> int:
        """Number of micro-batches that each model copy runs per optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    @property
    def length_multiple(self) -> int:
        """The number whose multiples the lengths of padded sequences are, where they differ.

        It is that of --pad-to-multiple, or a multiple of it that all ranks that share a sequence
        can divide. --seq-length itself is always allowed.
        """
        return math.lcm(self.pad_to_multiple, self.sequence_parts)

    @property
    def sequence_parts(self) -> int:
        """Number of equal parts into which ranks cut a sequence, by --tp and --cp."""
        return (self.tp if self.sequence_parallel else 1) * self.cp

    @property
    def warmup_iters(self) -> float:
        """Number of optimizer steps with a rising learning rate; may have a fraction."""
        if self.lr_warmup_fraction is not None:
            return self.lr_warmup_fraction * self.train_iters
        return self.lr_warmup_iters

    def with_steps(self, train_iters: int) -> Self:
        """Returns the options with a number of steps in place of `--epochs`.

        Raises:
            ConfigError: An option doesn't fit that number.
        """
        return self.parse({**dict(self), "train_iters": train_iters, "epochs": None})

    def trains(self, name: str) -> bool:
        """Returns whether a weight is trained.

        Every one is, unless an adapter is, or --train-only or --freeze choose.

        This is decided here alone. The model freezes the others before DDP wraps it, so that they
        have neither gradients nor optimizer state; the predicted memory and the size of a
        checkpoint follow from the same answer.

        Args:
            name: The weight's name in the chatglm layout, with the number of its layer.
        """
        return not self.is_adapted and self.selects(name)

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        if self.is_adapted and self.is_partial:
            raise ValueError(
                "--train-only and --freeze choose among the weights, of which none is trained with "
                "--lora-rank or --adapter; --lora-target chooses the layers of an adapter"
            )
        return self

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.method != "sft" and (self.loss_average != "token" or self.last_turn_only):
            raise ValueError(
                "--loss-average and --last-turn-only are for --method sft; the answer of a "
                "preference is compared as a whole"
            )
        return self

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
        parts = self.sequence_parts
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
        last = self.profile_steps[-1] if self.profile_steps else 0
        if self.train_iters and last > self.train_iters:
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


class PretrainConfig(TrainConfig):
    """The options of `glm3 pretrain`."""

    command = "pretrain"


class FinetuneConfig(TrainConfig):
    """The options of `glm3 finetune`.

    With `--epochs` the number of steps is 0 until the data is known; see `with_steps`.
    """

    command = "finetune"

    train_iters: Annotated[int, Flag(panel=OPTIMIZER)] = Field(
        default=0, ge=0, description="Optimizer steps; or give --epochs."
    )

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if not self.train_iters and self.epochs is None:
            raise ValueError("--train-iters is missing; or give --epochs")
        if self.train_iters and self.epochs is not None:
            raise ValueError("give --train-iters or --epochs, not both")
        for name in ("keep_best", "early_stop"):
            if getattr(self, name) and self.eval_interval is None:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} goes by validations: give --eval-interval, too")
        return self
