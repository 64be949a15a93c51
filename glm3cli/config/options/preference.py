"""`PreferenceOptions`: the methods by which finetune learns what people prefer.

Names and defaults are TRL's (DPOConfig, ORPOConfig, CPOConfig for SimPO, KTOConfig).
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from glm3cli.config.base import Flag, Settings

Method = Literal["sft", "dpo", "orpo", "simpo", "kto"]
PREFERENCES = "Preferences"
# The methods that train on pairs of a chosen and a rejected answer.
PAIRED: frozenset[Method] = frozenset({"dpo", "orpo", "simpo"})
# The methods that compare the model with a reference.
COMPARING: frozenset[Method] = frozenset({"dpo", "kto"})
# The methods that each option is for; with others it would do nothing.
_USES: dict[str, frozenset[Method]] = {
    "beta": PAIRED | {"kto"},
    "preference_loss": frozenset({"dpo"}),
    "label_smoothing": frozenset({"dpo", "simpo"}),
    "sft_weight": frozenset({"dpo", "simpo"}),
    "simpo_gamma": frozenset({"simpo"}),
    "desirable_weight": frozenset({"kto"}),
    "undesirable_weight": frozenset({"kto"}),
    "reference": COMPARING,
}


class PreferenceOptions(Settings):
    """The options for learning from chosen and rejected answers, or from liked and disliked ones.

    The methods are DPO (Rafailov et al. 2023), ORPO (Hong et al. 2024), SimPO (Meng et al. 2024)
    and KTO (Ethayarajh et al. 2024); `sft` learns answers as they are.
    """

    method: Annotated[Method, Flag(panel=PREFERENCES, only="finetune")] = Field(
        default="sft",
        description="sft: learn answers; dpo, orpo, simpo: prefer chosen to rejected ones; kto: "
        "learn liked ones, avoid disliked ones.",
    )
    beta: Annotated[float, Flag(panel=PREFERENCES, only="finetune")] = Field(
        default=0.1, gt=0, description="Factor on the log-probabilities, or on ORPO's odds ratio."
    )
    preference_loss: Annotated[
        Literal["sigmoid", "hinge", "ipo", "robust"], Flag(panel=PREFERENCES, only="finetune")
    ] = Field(default="sigmoid", description="The loss of DPO.")
    label_smoothing: Annotated[float, Flag(panel=PREFERENCES, only="finetune")] = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="The probability that chosen and rejected are swapped, for sigmoid (cDPO), "
        "robust (Robust DPO) and simpo.",
    )
    sft_weight: Annotated[float, Flag(panel=PREFERENCES, only="finetune")] = Field(
        default=0.0,
        ge=0,
        description="Adds the mean loss of the tokens of chosen answers, times this, to dpo and "
        "simpo; orpo has such a term.",
    )
    simpo_gamma: Annotated[float, Flag(panel=PREFERENCES, only="finetune")] = Field(
        default=0.5, ge=0, description="The margin between rewards that simpo aims at."
    )
    desirable_weight: Annotated[float, Flag(panel=PREFERENCES, only="finetune")] = Field(
        default=1.0, ge=0, description="Factor on kto's loss of liked answers."
    )
    undesirable_weight: Annotated[float, Flag(panel=PREFERENCES, only="finetune")] = Field(
        default=1.0, ge=0, description="Factor on kto's loss of disliked answers."
    )
    reference: Annotated[Path | None, Flag(panel=PREFERENCES, only="finetune", metavar="MODEL")] = (
        Field(
            default=None,
            description="Model that dpo and kto compare with; default: --model, without adapters.",
        )
    )

    @property
    def is_paired(self) -> bool:
        """Whether a sample is a pair of answers."""
        return self.method in PAIRED

    @property
    def compares(self) -> bool:
        """Whether the loss compares the model with a reference."""
        return self.method in COMPARING

    @property
    def needs_all_losses(self) -> bool:
        """Whether losses count of tokens outside the loss mask: of ORPO's prompts they do."""
        return self.method == "orpo"

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        for name, methods in _USES.items():
            value = getattr(self, name)
            if self.method not in methods and value != type(self).model_fields[name].default:
                flag, users = name.replace("_", "-"), " or ".join(sorted(methods))
                raise ValueError(f"--{flag} {value} is for --method {users}, not {self.method}")
        if self.label_smoothing and self.preference_loss in ("hinge", "ipo"):
            raise ValueError(
                f"--label-smoothing is for --preference-loss sigmoid or robust, not "
                f"{self.preference_loss}"
            )
        if self.preference_loss == "robust" and not self.label_smoothing:
            raise ValueError("--preference-loss robust needs a --label-smoothing, such as 0.1")
        return self
