"""adapter_config.json of PEFT's LoRA: rank and scale of every module. Free of torch."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from glm3cli.errors import CheckpointError

CONFIG = "adapter_config.json"
# These begin from a base model whose weights they have changed, so W + BA isn't what was trained.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")


class AdapterConfig(BaseModel):
    """What merging needs of the file, and what is kept; PEFT's names (tuners/lora/config.py)."""

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
        """The rank of one module."""
        return int(_matching(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """What the product of the two matrices is multiplied by."""
        rank = self.rank(module)
        alpha = _matching(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def wants(self, module: str) -> bool:
        """Whether the file says that this module has an adapter; False where it doesn't tell."""
        if self.exclude_modules or self.layers_to_transform is not None:
            return False
        if isinstance(self.target_modules, list):
            return any(f".{module}".endswith(f".{name}") for name in self.target_modules)
        if self.target_modules in (None, "all-linear"):
            return False
        return re.fullmatch(self.target_modules, module) is not None


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value whose pattern ends the module's name, as PEFT has it (get_pattern_key)."""
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The config of a PEFT adapter.

    Raises:
        CheckpointError: There is none, or it is of a kind that can't be merged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"the adapter {folder} has no {CONFIG}",
            "give a folder that PEFT's save_pretrained wrote",
        )
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config = AdapterConfig.model_validate(
            {name: value for name, value in values.items() if value is not None}
        )
        patterns = [*config.rank_pattern, *config.alpha_pattern]
        for pattern in (*patterns, config.target_modules):
            re.compile(pattern if isinstance(pattern, str) else "")
    except (ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{path}: {_reason(error)}", "save the adapter again") from None
    start = str(config.init_lora_weights).lower()
    obstacle = {
        f"peft_type {config.peft_type}": config.peft_type != "LORA",
        "use_dora": config.use_dora,
        "fan_in_fan_out": config.fan_in_fan_out,
        f"init_lora_weights {start}": start.startswith(_CHANGE_THE_BASE),
    }
    for name, is_there in obstacle.items():
        if is_there:
            raise CheckpointError(
                f"{path} has {name}, which glm3 doesn't merge",
                "merge it by PEFT's merge_and_unload, and convert the result",
            )
    return config


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if isinstance(error, re.error):
        return f"{error.pattern!r} is no regular expression"
    return f"is no valid JSON: {error}"
