"""`StartOptions`: the weights that a training starts from."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag, Settings
from glm3cli.config.model import DType

MODEL = "Model"


class StartOptions(Settings):
    """The options for the weights that a training starts from, and for their type."""

    model: Annotated[Path | None, Flag(panel=MODEL)] = Field(
        default=None, description="Model folder in any layout, or a training run's folder."
    )
    from_scratch: Annotated[bool, Flag(panel=MODEL)] = Field(
        default=False, description="Start from random weights of the shape --model-config."
    )
    shape: Annotated[
        str | None, Flag(name="model_config", panel=MODEL, metavar="6b|9b|tiny|FILE", is_path=True)
    ] = Field(default=None, description="Shape for --from-scratch: a preset or a config.json.")
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
