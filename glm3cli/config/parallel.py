"""The options for the parallel sizes, and checks whether they fit a model and a number of ranks."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag, Settings
from glm3cli.config.model import ModelConfig
from glm3cli.errors import ConfigError

PANEL = "Parallelism"
# The share of the slowest stage's time with equal stages that others may take at most.
_WORTH_IT = 0.9


class ModelParallelConfig(Settings):
    """The sizes by which one copy of a model is cut over ranks: tensor and pipeline parallelism."""

    tp: Annotated[
        int,
        Flag(("--tensor-model-parallel-size", "--target-tensor-parallel-size"), panel=PANEL),
    ] = Field(default=1, ge=1, description="Tensor parallel size.")
    pp: Annotated[
        int,
        Flag(("--pipeline-model-parallel-size", "--target-pipeline-parallel-size"), panel=PANEL),
    ] = Field(default=1, ge=1, description="Pipeline parallel size.")
    vpp: Annotated[int, Flag(panel=PANEL)] = Field(
        default=1, ge=1, description="Model chunks per pipeline stage (interleaved schedule)."
    )
    layers_per_stage: Annotated[
        str | None, Flag(("--num-layer-list",), panel=PANEL, metavar="N,N,...")
    ] = Field(
        default=None,
        description="Layers of each pipeline stage, for uneven stages.",
        pattern=r"^\d+(,\d+)*$",
    )

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if self.layers_per_stage and self.vpp > 1:
            raise ValueError("--layers-per-stage and --vpp can't be used together; drop one")
        if self.layers_per_stage and len(self.stage_sizes or ()) != self.pp:
            raise ValueError(
                f"--layers-per-stage {self.layers_per_stage} names "
                f"{len(self.stage_sizes or ())} stages, but --pp is {self.pp}"
            )
        return self

    @property
    def stage_sizes(self) -> tuple[int, ...] | None:
        """Number of layers of each pipeline stage if `layers_per_stage` gives them, else None."""
        if self.layers_per_stage is None:
            return None
        return tuple(int(size) for size in self.layers_per_stage.split(","))

    @property
    def model_parallel_size(self) -> int:
        """Number of ranks that hold one copy of the model: tp x pp."""
        return self.tp * self.pp

    def check_world(self, world_size: int) -> None:
        """Checks that `world_size` ranks can hold whole copies of the model.

        Raises:
            ConfigError: The number of ranks is no multiple of tp x pp.
        """
        if world_size % self.model_parallel_size:
            raise ConfigError(
                f"{world_size} rank(s) can't hold --tp {self.tp} x --pp {self.pp} = "
                f"{self.model_parallel_size}",
                f"start a multiple of {self.model_parallel_size} ranks, e.g. --nproc "
                f"{self.model_parallel_size}",
            )

    def balanced(self, model: ModelConfig) -> Self:
        """Returns these sizes with stages that take about equally long to decode a token.

        That is as long as to read their weights. The output layer, which the last stage has, weighs
        as much as one layer of a 6B model and as several of a small one. Stages stay equal where
        the slowest would gain less than a tenth, since prompts are read by the layers alone.

        Args:
            model: The model, whose layers need not be divisible by the number of stages.

        Returns:
            The sizes; the same ones if they say how many layers each stage has, or if the model has
            fewer layers than stages.
        """
        num_layers, others = model.num_layers, self.pp - 1
        if self.layers_per_stage is not None or not 0 < others < num_layers:
            return self
        output = model.padded_vocab_size * model.hidden_size / model.layer_parameters

        def slowest(last: int) -> float:
            return max(-(-(num_layers - last) // others), last + output)

        equal = num_layers // self.pp
        last = min(range(1, num_layers - others + 1), key=lambda n: (slowest(n), abs(n - equal)))
        if num_layers % self.pp == 0 and slowest(last) > _WORTH_IT * slowest(equal):
            return self
        size, more = divmod(num_layers - last, others)
        sizes = [size + (stage < more) for stage in range(others)]
        return self.model_copy(update={"layers_per_stage": ",".join(map(str, [*sizes, last]))})

    def layers_of(self, num_layers: int, pp_rank: int, chunk: int = 0) -> range:
        """Returns the global numbers (from 0) of the layers that a chunk of a stage holds.

        With vpp chunks per stage, chunk v holds layers of the v-th pass through all stages
        (megatron-core's interleaved order).

        Args:
            num_layers: Number of layers of the whole model.
            pp_rank: The pipeline stage, from 0.
            chunk: The chunk of the stage, from 0.
        """
        if self.stage_sizes is not None:
            start = sum(self.stage_sizes[:pp_rank])
            return range(start, start + self.stage_sizes[pp_rank])
        size = num_layers // (self.pp * self.vpp)
        start = (chunk * self.pp + pp_rank) * size
        return range(start, start + size)

    def layers_of_stage(self, num_layers: int, pp_rank: int) -> list[int]:
        """Returns the global numbers (from 0) of all layers that a stage holds.

        Args:
            num_layers: Number of layers of the whole model.
            pp_rank: The pipeline stage, from 0.
        """
        chunks = range(self.vpp)
        return [layer for c in chunks for layer in self.layers_of(num_layers, pp_rank, c)]

    def check_fits(self, model: ModelConfig) -> None:
        """Checks that `model` can be cut by these sizes.

        Raises:
            ConfigError: It can't; the message has all sizes that don't divide, the hint the sizes
                that would.
        """
        problems = [
            f"{name} {value} is not divisible by --tp {self.tp}"
            for name, value in (
                ("num_attention_heads", model.num_attention_heads),
                ("ffn_hidden_size", model.ffn_hidden_size),
                ("padded_vocab_size", model.padded_vocab_size),
            )
            if value % self.tp
        ]
        if self.tp % model.num_query_groups and model.num_query_groups % self.tp:
            problems.append(
                f"--tp {self.tp} and multi_query_group_num {model.num_query_groups}: one must "
                "divide the other"
            )
        if problems:
            raise ConfigError("; ".join(problems), f"use --tp {_any_of(self._legal_tp(model))}")
        self._check_layers(model)

    def _legal_tp(self, model: ModelConfig) -> list[int]:
        """Returns the tensor parallel sizes by which `model` can be cut."""
        sizes = (model.num_attention_heads, model.ffn_hidden_size, model.padded_vocab_size)
        groups = model.num_query_groups
        return [
            tp
            for tp in range(1, model.num_attention_heads + 1)
            if all(size % tp == 0 for size in sizes) and (tp % groups == 0 or groups % tp == 0)
        ]

    def _check_layers(self, model: ModelConfig) -> None:
        if self.stage_sizes is not None:
            if sum(self.stage_sizes) != model.num_layers or 0 in self.stage_sizes:
                total = sum(self.stage_sizes)
                wrong = f"adds up to {total} layers, but the model has {model.num_layers}"
                if 0 in self.stage_sizes:
                    wrong = "has a stage without layers"
                raise ConfigError(
                    f"--layers-per-stage {self.layers_per_stage} {wrong}",
                    f"give {self.pp} numbers above 0 that add up to {model.num_layers}",
                )
        elif model.num_layers % (self.pp * self.vpp):
            legal = [n for n in range(1, model.num_layers + 1) if model.num_layers % n == 0]
            raise ConfigError(
                f"num_layers {model.num_layers} is not divisible by --pp {self.pp} x --vpp "
                f"{self.vpp}",
                f"use pp x vpp = {_any_of(legal)}, or --layers-per-stage for uneven stages",
            )
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(
                "--vpp needs more than one pipeline stage", "drop --vpp or raise --pp"
            )


class ParallelConfig(ModelParallelConfig):
    """The sizes of all parallel axes. Data parallelism takes the ranks that are left.

    Its size isn't an option: it is the number of ranks divided by tp x pp x cp.
    """

    cp: Annotated[int, Flag(("--context-parallel-size", "--context-parallel"), panel=PANEL)] = (
        Field(default=1, ge=1, description="Context parallel size: ranks that share a sequence.")
    )
    mc2: Annotated[bool, Flag(panel=PANEL)] = Field(
        default=False,
        description="Send while multiplying in tensor parallel layers (MC2 operators); off because "
        "they want one server whose devices are all joined, and software of one release.",
    )


def _any_of(values: list[int]) -> str:
    """Joins numbers as in "1, 2 or 4"."""
    head = ", ".join(str(value) for value in values[:-1])
    return f"{head} or {values[-1]}" if head else str(values[-1])
