"""`OptimizerOptions`: AdamW and the learning rate."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag, Settings

OPTIMIZER = "Optimizer"


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
        if self.train_iters and self.lr_warmup_iters >= self.train_iters:
            raise ValueError(
                f"--lr-warmup-iters {self.lr_warmup_iters} must be below --train-iters "
                f"{self.train_iters}"
            )
        return self
