"""`BatchOptions`: how `glm3 finetune` makes batches of samples whose lengths differ."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag, Settings

BATCHES = "Batches of instructions"


class BatchOptions(Settings):
    """The options that make micro-batches of samples of different lengths.

    Texts, which `glm3 pretrain` cuts to one length, need none of them.
    """

    padding: Annotated[Literal["longest", "full"], Flag(panel=BATCHES, only="finetune")] = Field(
        default="longest",
        description="Pad samples to the longest of their micro-batch, or to --seq-length.",
    )
    padding_side: Annotated[Literal["left", "right"], Flag(panel=BATCHES, only="finetune")] = Field(
        default="right", description="Where padding goes; the loss is the same."
    )
    pad_to_multiple: Annotated[
        int, Flag(("--pad-to-multiple-of",), panel=BATCHES, only="finetune")
    ] = Field(
        default=16,
        ge=1,
        description="Padding to the longest rounds its length up to a multiple of this number.",
    )
    packing: Annotated[bool, Flag(panel=BATCHES, only="finetune")] = Field(
        default=False,
        description="Put several samples into a sequence of --seq-length; none sees another.",
    )
    group_by_length: Annotated[bool, Flag(panel=BATCHES, only="finetune")] = Field(
        default=False,
        description="Take samples of similar lengths in one step, the longest in the first.",
    )

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        if self.packing and self.group_by_length:
            raise ValueError(
                "--packing makes all sequences about as long as --seq-length: drop it or "
                "--group-by-length"
            )
        return self
