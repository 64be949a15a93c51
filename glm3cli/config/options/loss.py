"""`LossOptions`: which tokens `glm3 finetune` trains, and how much each of them weighs."""

from typing import Annotated, Literal

from pydantic import Field

from glm3cli.config.base import Flag, Settings

LOSS = "Loss of instructions"


class LossOptions(Settings):
    """The options for the loss of instructions and conversations."""

    loss_average: Annotated[Literal["token", "sample"], Flag(panel=LOSS, only="finetune")] = Field(
        default="token",
        description="What weighs the same in a step: every trained token, or every sample, as in "
        "ModelLink.",
    )
    last_turn_only: Annotated[bool, Flag(panel=LOSS, only="finetune")] = Field(
        default=False, description="Train the last trained answer of a conversation alone."
    )
    neftune_alpha: Annotated[float | None, Flag(panel=LOSS, only="finetune")] = Field(
        default=None,
        gt=0,
        description="Add noise of this strength to the embeddings in training (NEFTune; e.g. 5).",
    )
