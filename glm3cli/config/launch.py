"""`LaunchConfig`: the options for the device on which a command runs, and for its ranks."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag, Settings
from glm3cli.host.environment import number_of
from glm3cli.host.launcher import is_local_rank, launched_ranks

PANEL = "Device and launch"
# The operations for which a chip may have a kernel of its own.
KERNELS = (
    "rms-norm",
    "swiglu",
    "rotary",
    "attention",
    "decode-attention",
    "decode-graph",
    "cross-entropy",
    "linear",
    "quantized-linear",
    "mc2",
    "adamw",
)


class LaunchConfig(Settings):
    """The options that every command that runs a model has: its device, and how ranks start."""

    device: Annotated[Literal["auto", "npu", "cuda", "cpu"], Flag(panel=PANEL)] = Field(
        default="auto", description="Chip; auto is npu if there is one, else cuda, else cpu."
    )
    nproc: Annotated[int | None, Flag(panel=PANEL)] = Field(
        default=None,
        ge=1,
        le=4096,
        description="Start this many local ranks (torchrun does it otherwise).",
    )

    max_restarts: Annotated[int, Flag(panel=PANEL)] = Field(
        default=0, ge=0, description="Of --nproc: how often all ranks start again if one dies."
    )
    without_kernel: Annotated[list[str], Flag(panel=PANEL, metavar="NAME")] = Field(
        default=[],
        description="Compute an operation in plain torch, not by the chip's kernel; repeat for "
        f"several: {', '.join(KERNELS)}.",
    )

    @model_validator(mode="after")
    def _check_kernels(self) -> Self:
        for name in self.without_kernel:
            if name not in KERNELS:
                raise ValueError(f"--without-kernel {name}: the names are {', '.join(KERNELS)}")
        return self

    @model_validator(mode="after")
    def _check_launcher(self) -> Self:
        ranks, nproc = launched_ranks(), self.nproc or 1
        if ranks and nproc > 1 and not is_local_rank():
            raise ValueError(
                f"--nproc {nproc}, but WORLD_SIZE={ranks} in the environment makes this process "
                f"one of {ranks} ranks: start those of each machine by torchrun (--nnodes {ranks} "
                f"--nproc_per_node {nproc}), or leave --nproc out, or unset WORLD_SIZE"
            )
        return self

    @property
    def world_size(self) -> int:
        """Number of ranks: of the launcher that has started them, else `nproc`, else 1."""
        return launched_ranks() or self.nproc or 1

    @property
    def num_local_ranks(self) -> int:
        """Number of ranks on this machine, also in the process that starts them."""
        return number_of("LOCAL_WORLD_SIZE", self.nproc or 1)
