"""The small files that make a folder of weights a usable model: config, tokenizer, remote code."""

import json
import shutil
from pathlib import Path
from typing import Any

from glm3cli.checkpoint.layouts.glm_folder import write_glm_files
from glm3cli.checkpoint.locate import locate
from glm3cli.checkpoint.names import Layout
from glm3cli.config.model import ModelConfig, is_glm
from glm3cli.errors import CheckpointError

TOKENIZER = "tokenizer.model"
COMPANIONS = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenization_chatglm.py",
    "configuration_chatglm.py",
    "modeling_chatglm.py",
    "quantization.py",
    "generation_config.json",
)


def copy_companions(
    source: Path, target: Path, model: ModelConfig, layout: Layout = "chatglm"
) -> None:
    """Copies what a MODEL needs beside its weights into `target`, byte by byte.

    A `glm` folder has files of its own, which are made from the model and its tokenizer. Going from
    there to another layout, only the tokenizer.model is copied: the rest is for transformers.

    config.json is rewritten only where it describes another model than `model` (after a cast, for
    instance), and made from `model` where there is none.

    Args:
        source: A MODEL, or another folder with such files.
        target: The folder to complete.
        model: The model whose weights lie in `target`.
        layout: The layout of these weights.
    """
    if layout == "glm":
        write_glm_files(target, model, find_companion(source, TOKENIZER))
        return
    places = _places(source)
    config = _find(places, "config.json")
    is_other = config is not None and is_glm(config)
    for name in (TOKENIZER,) if is_other else COMPANIONS:
        found = _find(places, name)
        if found is not None:
            shutil.copyfile(found, target / name)
    if is_other:
        config = None
    if config is not None and ModelConfig.from_file(config) == model:
        shutil.copyfile(config, target / "config.json")
        return
    values = model.to_hf() if config is None else _updated(config, model)
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")


def find_companion(source: Path, name: str) -> Path | None:
    """Where a MODEL, or another folder with such files, has the file `name`."""
    return _find(_places(source), name)


def _updated(config: Path, model: ModelConfig) -> dict[str, Any]:
    """A config.json with what `model` has differently; all else, such as auto_map, stays."""
    raw: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    new, old = model.to_hf(), ModelConfig.from_file(config).to_hf()
    changes = {name: value for name, value in new.items() if value != old[name]}
    if "dtype" in raw and "torch_dtype" in changes:  # the newer spelling of transformers
        changes["dtype"] = changes["torch_dtype"]
    return raw | changes


def _places(source: Path) -> list[Path]:
    """The folder itself, and the parts of the MODEL in it where the files may lie."""
    try:
        location = locate(source)
    except CheckpointError:
        return [source]
    above = [location.config.parent] if location.config else []
    return list(dict.fromkeys([source, *above, location.folder]))


def _find(places: list[Path], name: str) -> Path | None:
    return next((place / name for place in places if (place / name).is_file()), None)
