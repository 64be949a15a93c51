"""`MegatronOptions`: how megatron-core saves memory and overlaps communication."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag, Settings
from glm3cli.config.parallel import PANEL as PARALLEL


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
    batched_messages: Annotated[bool, Flag(panel=PARALLEL)] = Field(
        default=True,
        description="Send between stages in batches, in the pipeline's own group; one by one, each "
        "pair of stages has a group with buffers of its own.",
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
