"""Writes LoRA adapters as PEFT saves them, with the module names of either Hugging Face layout.

The glm layout has three projections where the chatglm layout has one, query_key_value. An adapter
of the one matrix becomes three that share A. Three become one whose rank is the sum of theirs, and
whose B has a block for each. W + scale B A stays the same.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from glm3cli.checkpoint.adapter.config import AdapterConfig
from glm3cli.checkpoint.adapter.pairs import Adapter, Pair, joined
from glm3cli.checkpoint.adapter.reader import WEIGHTS_FILE, modules_in
from glm3cli.checkpoint.locate import ADAPTER_CONFIG
from glm3cli.checkpoint.names import HfLayout
from glm3cli.config.model import ModelConfig
from glm3cli.errors import CheckpointError


def write_adapter(
    folder: Path,
    adapter: Adapter,
    layout: HfLayout,
    model: ModelConfig,
    config: AdapterConfig,
    base: Path,
) -> int:
    """Writes adapter_config.json and the weights of an adapter, like PEFT's save_pretrained.

    Args:
        folder: An empty folder.
        adapter: The matrices, with their ranks and scales.
        layout: The layout whose module names the adapter gets.
        model: The shape of the base model.
        config: The other fields of adapter_config.json.
        base: The folder of the base model, where PEFT is going to look for it.

    Returns:
        The number of adapted modules.

    Raises:
        CheckpointError: A DoRA adapts some of the layout's modules in part.
    """
    pairs = dict(_pairs(adapter, layout, model))
    tensors = {
        f"base_model.model.{name}.lora_{side}": matrix.contiguous().clone()
        for name, pair in pairs.items()
        for side, matrix in _sides(name, pair).items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    described = _described(pairs, rank_stabilised=config.use_rslora)
    described["target_modules"] = _short_names(pairs, layout, model)
    content = config.model_dump() | described | {"base_model_name_or_path": str(base)}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8", errors="backslashreplace")
    return len(pairs)


def _sides(name: str, pair: Pair) -> dict[str, Tensor]:
    """Returns the tensors of a module by the ends of their names in PEFT's files.

    Raises:
        CheckpointError: The pair is a DoRA that leaves some rows as they are.
    """
    sides = {"A.weight": pair.a, "B.weight": pair.b}
    if pair.magnitude is None:
        return sides
    if pair.magnitude.isnan().any():
        raise CheckpointError(
            f"the adapter is a DoRA of a part of {name}, which has no form as a whole",
            "merge it into the model by `glm3 convert mg2hf --lora`",
        )
    return sides | {"magnitude_vector": pair.magnitude}


def _pairs(adapter: Adapter, layout: HfLayout, model: ModelConfig) -> Iterator[tuple[str, Pair]]:
    """Yields the name and the matrices of every adapted module of a layout."""
    for name, module in modules_in(layout, model).items():
        rows = module.rows
        found = [
            pair
            for pair in adapter.pairs.get(module.slot, ())
            if pair.rows.start < rows.stop and rows.start < pair.rows.stop
        ]
        if found:
            yield name, joined(found, rows)


def _described(pairs: dict[str, Pair], *, rank_stabilised: bool) -> dict[str, Any]:
    """Returns the fields of adapter_config.json that hold the modules' ranks and scales.

    Args:
        pairs: The adapted modules, by their names.
        rank_stabilised: Whether the scale is to be alpha / sqrt(rank) instead of alpha / rank.
    """
    power = 0.5 if rank_stabilised else 1.0
    ranks = {name: pair.a.size(0) for name, pair in pairs.items()}
    alphas = {name: pair.scale * ranks[name] ** power for name, pair in pairs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": _short(alpha),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {n: _short(value) for n, value in alphas.items() if value != alpha},
        "exclude_modules": None,
        "layers_to_transform": None,
    }


def _short_names(pairs: dict[str, Pair], layout: HfLayout, model: ModelConfig) -> list[str]:
    """Returns the names by which PEFT finds the modules: their last words, if that is exact.

    Args:
        pairs: The adapted modules, by their names.
        layout: The layout of the names.
        model: The shape of the base model.
    """
    ends = {name: name.rpartition(".")[2] for name in modules_in(layout, model)}
    adapted = {ends[name] for name in pairs}
    if all(name in pairs for name, end in ends.items() if end in adapted):
        return list(dict.fromkeys(ends[name] for name in pairs))
    return list(pairs)


def _short(value: float) -> float:
    """Returns a number, as an int if it is whole but for the rounding of a division."""
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, value) else value
