"""Reads adapter_config.json of a PEFT LoRA adapter: the rank and the scale of every module.

Needs no torch, so that a wrong adapter is reported within a second.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from glm3cli.checkpoint.locate import ADAPTER_CONFIG
from glm3cli.errors import CheckpointError
from glm3cli.host.parsing import read_json

# Initialisations that change the weights of the base model, so that W + BA isn't what was trained.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields of PEFT's LoraConfig by which an adapter is something else than W + BA, and what it is.
_OTHER_KINDS = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which works behind certain tokens alone",
    "modules_to_save": "an adapter with whole modules beside it (modules_to_save)",
    "trainable_token_indices": "an adapter with rows of the embedding beside it",
    "target_parameters": "an adapter of single parameters",
    "layer_replication": "an adapter of a model with repeated layers",
    "lora_bias": "a LoRA with biases",
    "use_qalora": "a QALoRA",
    "use_bdlora": "a block-diagonal LoRA (BD-LoRA)",
    "arrow_config": "an Arrow, which chooses among adapters",
    "kasa_config": "a KaSA",
    "velora_config": "a VeLoRA",
    "monteclora_config": "a MonteCLoRA",
    "fan_in_fan_out": "an adapter of weights stored as [inputs, outputs] (fan_in_fan_out)",
}


class AdapterConfig(BaseModel):
    """The fields of adapter_config.json that merging needs, and those that a new adapter keeps.

    Names and meanings are PEFT's (tuners/lora/config.py).

    Attributes:
        peft_type: The kind of adapter; only LORA is known.
        task_type: The kind of model, such as CAUSAL_LM.
        base_model_name_or_path: The base model that the adapter was trained on.
        inference_mode: Whether PEFT loads the adapter for inference only.
        lora_dropout: The share of inputs that training dropped.
        bias: Which biases training changed.
        r: The rank of the matrices of all modules that `rank_pattern` doesn't name.
        lora_alpha: The numerator of the scale of all modules that `alpha_pattern` doesn't name.
        target_modules: The ends of the adapted modules' names, or a regular expression that matches
            the names.
        exclude_modules: Modules that aren't adapted, in the same form.
        layers_to_transform: The layers that are adapted; None for all.
        rank_pattern: The rank by the end of the module's name, a regular expression.
        alpha_pattern: The numerator of the scale by the end of the module's name.
        use_rslora: Whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        use_dora: Whether the adapter is a DoRA, which has the lengths of the weights' rows as well.
        fan_in_fan_out: Whether weights are stored as [inputs, outputs]; always False.
        init_lora_weights: How the matrices were initialised.
    """

    peft_type: str = "LORA"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = True
    lora_dropout: float = 0.0
    bias: str = "none"
    r: int = Field(gt=0)
    lora_alpha: float
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str | None = True

    def rank(self, module: str) -> int:
        """Returns the rank of one module's matrices."""
        return int(_matching(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """Returns the factor by which the product of a module's two matrices is multiplied."""
        rank = self.rank(module)
        alpha = _matching(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def wants(self, module: str) -> bool:
        """Says whether the file names this module as adapted; False if that isn't certain."""
        if self.exclude_modules or self.layers_to_transform is not None:
            return False
        if isinstance(self.target_modules, list):
            return any(f".{module}".endswith(f".{name}") for name in self.target_modules)
        if self.target_modules in (None, "all-linear"):
            return False
        return re.fullmatch(self.target_modules, module) is not None


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Returns the value whose pattern matches the end of a module's name, else the default.

    The rule is that of PEFT (get_pattern_key).
    """
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads the config of a PEFT adapter.

    Args:
        folder: The folder of the adapter.

    Raises:
        CheckpointError: The file is missing or damaged, or the adapter is of a kind that isn't
            known.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"the adapter {folder} has no {ADAPTER_CONFIG}",
            "give a folder that PEFT's save_pretrained wrote",
        )
    try:
        values: dict[str, Any] = read_json(path)
        _refuse_other_kinds(path, values)
        config = AdapterConfig.model_validate(
            {name: value for name, value in values.items() if value is not None}
        )
        patterns = [*config.rank_pattern, *config.alpha_pattern]
        for pattern in (*patterns, config.target_modules):
            re.compile(pattern if isinstance(pattern, str) else "")
    except (ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{path}: {_reason(error)}", "save the adapter again") from None
    return config


def _refuse_other_kinds(path: Path, values: Mapping[str, Any]) -> None:
    """Refuses adapters that are something else than matrices A and B, perhaps with lengths.

    Args:
        path: The file, for messages.
        values: Its content.

    Raises:
        CheckpointError: The adapter is of another kind.
    """
    peft_type = str(values.get("peft_type") or "LORA")
    start = str(values.get("init_lora_weights")).lower()
    kinds = [kind for field, kind in _OTHER_KINDS.items() if values.get(field)]
    if peft_type != "LORA":
        kinds.insert(0, f"an adapter of the kind {peft_type}")
    if (bias := values.get("bias") or "none") != "none":
        kinds.append(f"a LoRA with biases (bias {bias})")
    if start.startswith(_CHANGE_THE_BASE):
        kinds.append(f"a LoRA whose start, {start}, changed the weights of the base model")
    if kinds:
        raise CheckpointError(
            f"{path} is of {kinds[0]}; glm3 knows LoRA, rsLoRA and DoRA",
            "merge it by PEFT's merge_and_unload, if that can, and convert the result",
        )


def _reason(error: Exception) -> str:
    """Returns in one line what is wrong with an adapter_config.json."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if isinstance(error, re.error):
        return f"{error.pattern!r} is no regular expression"
    return f"is no valid JSON: {error}"
