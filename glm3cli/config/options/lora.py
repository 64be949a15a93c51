"""`LoraOptions`: low-rank adapters that are trained instead of the weights."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from glm3cli.config.base import Flag, Settings

ADAPTER = "Adapter (LoRA)"

LoraVariant = Literal["lora", "rslora", "dora", "pissa"]
# The targets of --lora-target, with the logical name of the weight that each adapts
# (checkpoint/names.py).
TARGETS = {
    "qkv": "qkv_weight",
    "proj": "attention_out",
    "fc1": "mlp_up",
    "fc2": "mlp_down",
}


class LoraOptions(Settings):
    """The options for a low-rank adapter (LoRA), which is trained in place of the weights."""

    lora_rank: Annotated[int | None, Flag(panel=ADAPTER, only="finetune")] = Field(
        default=None,
        ge=1,
        description="Train a low-rank adapter of this rank (LoRA) instead of the weights.",
    )
    lora_alpha: Annotated[float | None, Flag(panel=ADAPTER, only="finetune")] = Field(
        default=None,
        gt=0,
        le=1e6,  # its multiples are numbers of every type that trains
        description="The adapter's product is scaled by alpha / rank; default: 2 x rank.",
    )
    lora_dropout: Annotated[float, Flag(panel=ADAPTER, only="finetune")] = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the adapted layers' inputs that the adapter doesn't see in a step.",
    )
    lora_target: Annotated[
        str | None, Flag(panel=ADAPTER, metavar="qkv,proj,fc1,fc2", only="finetune")
    ] = Field(default=None, description="The layers that get an adapter; default: all four.")
    lora_variant: Annotated[LoraVariant | None, Flag(panel=ADAPTER, only="finetune")] = Field(
        default=None,
        description="Scale by alpha / sqrt(rank) (rslora), learn the lengths of the weights' rows, "
        "too (dora), or start from the weights' principal part (pissa); default: lora.",
    )
    lora_plus: Annotated[float | None, Flag(panel=ADAPTER, metavar="RATIO", only="finetune")] = (
        Field(
            default=None,
            gt=0,
            description="Learning rate of B over that of A (LoRA+, which proposes 16); default: 1.",
        )
    )
    adapter: Annotated[Path | None, Flag(panel=ADAPTER, only="finetune")] = Field(
        default=None,
        description="Start from this adapter in PEFT's layout, which brings rank, alpha, "
        "targets, and variant.",
    )

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter is trained instead of the weights."""
        return self.lora_rank is not None or self.adapter is not None

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """The targets that get an adapter, in the order of `TARGETS`; none without an adapter."""
        if not self.is_adapted:
            return ()
        named = {name.strip() for name in (self.lora_target or ",".join(TARGETS)).split(",")}
        return tuple(name for name in TARGETS if name in named)

    @property
    def lora_scale(self) -> float:
        """The factor by which the product of an adapter's matrices is multiplied."""
        rank = self.lora_rank or 1
        alpha = 2.0 * rank if self.lora_alpha is None else self.lora_alpha
        return alpha / (math.sqrt(rank) if self.lora_variant == "rslora" else rank)

    @property
    def meant(self) -> dict[str, Any]:
        """What the options amount to that may be written in several ways, by their names."""
        if not self.is_adapted:
            return {}
        return {
            "lora_alpha": f"{self.lora_scale:.6g}",  # an adapter on the disk has rounded it
            "lora_target": self.lora_targets,
            "lora_variant": self.lora_variant or "lora",
            "lora_plus": self.lora_plus or 1.0,
        }

    @field_validator("lora_target")
    @classmethod
    def _check_target(cls, value: str | None) -> str | None:
        if value is None:
            return None
        names = [name.strip() for name in value.split(",") if name.strip()]
        unknown = [name for name in names if name not in TARGETS]
        if unknown or not names:
            found = f"{unknown[0]} is none of them" if unknown else "it names none"
            raise ValueError(f"give some of {', '.join(TARGETS)}; {found}")
        return value

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        given = {
            "--lora-alpha": self.lora_alpha,
            "--lora-dropout": self.lora_dropout or None,
            "--lora-target": self.lora_target,
            "--lora-variant": self.lora_variant,
            "--lora-plus": self.lora_plus,
        }
        for flag, value in given.items():
            if value is not None and not self.is_adapted:
                raise ValueError(f"{flag} goes with --lora-rank or --adapter")
        return self
