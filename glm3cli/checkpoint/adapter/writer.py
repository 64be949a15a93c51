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

import torch
from safetensors.torch import save_file
from torch import Tensor

from glm3cli.checkpoint.adapter.config import CONFIG, AdapterConfig
from glm3cli.checkpoint.adapter.reader import WEIGHTS_FILE, Adapter, Pair, modules_in
from glm3cli.checkpoint.names import HfLayout
from glm3cli.config.model import ModelConfig


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
    """
    pairs = dict(_pairs(adapter, layout, model))
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": matrix.contiguous().clone()
        for name, pair in pairs.items()
        for side, matrix in {"A": pair.a, "B": pair.b}.items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    content = config.model_dump() | _described(pairs) | {"base_model_name_or_path": str(base)}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return len(pairs)


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
            yield name, _joined(found, rows)


def _joined(pairs: list[Pair], rows: slice) -> Pair:
    """Returns one pair of matrices for some rows of a weight.

    Args:
        pairs: The pairs that change any of these rows.
        rows: The rows.

    Returns:
        A pair whose product in these rows is the sum of the products of `pairs`.
    """
    scale = pairs[0].scale
    blocks: list[Tensor] = []
    for pair in pairs:
        start, stop = max(pair.rows.start, rows.start), min(pair.rows.stop, rows.stop)
        block = torch.zeros(rows.stop - rows.start, pair.b.size(1), dtype=pair.b.dtype)
        part = pair.b[start - pair.rows.start : stop - pair.rows.start]
        block[start - rows.start : stop - rows.start] = part * (pair.scale / scale)
        blocks.append(block)
    return Pair(rows, torch.cat([pair.a for pair in pairs]), torch.cat(blocks, dim=1), scale)


def _described(pairs: dict[str, Pair]) -> dict[str, Any]:
    """Returns the fields of adapter_config.json that hold the modules' names, ranks and scales."""
    ranks = {name: pair.a.size(0) for name, pair in pairs.items()}
    alphas = {name: pair.scale * ranks[name] for name, pair in pairs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": _short(alpha),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {n: _short(value) for n, value in alphas.items() if value != alpha},
        "use_rslora": False,  # the alphas hold the scale already
        "target_modules": list(pairs),
        "exclude_modules": None,
        "layers_to_transform": None,
    }


def _short(value: float) -> float:
    """Returns a number, as an int if it is whole but for the rounding of a division."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
