"""Writes LoRA adapters in PEFT's layout, for the names of either Hugging Face layout.

Both layouts name the same weights, but GlmForCausalLM has three projections where the original code
has query_key_value. An adapter of the one matrix becomes three that share A; three become one whose
rank is the sum of theirs and whose B has a block for each. W + scale B A is the same.
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
    """Writes the two files of PEFT's save_pretrained.

    Args:
        folder: An empty folder.
        adapter: The matrices.
        layout: Whose names they get.
        model: The shape of the base model.
        config: What else is said of the adapter; ranks and scales are those of `adapter`.
        base: The base model, which PEFT looks for by this name.

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
    """The matrices of every module of `layout` that has some."""
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
    """One pair for these rows of a weight, whose product is that of `pairs` there."""
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
    """Ranks, scales and names of the modules, as PEFT reads them."""
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
    """A whole number without a fraction, and without the last digit's error of a division."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
