"""The small files beside the weights, which make a folder a usable model: config, tokenizer, code.

A folder in the chatglm layout has the files of the original remote code, which are copied. A folder
in the glm layout has files of its own, which are made from the model's shape and its tokenizer:
with them transformers needs no remote code. Per-rank files and `dist` get the chatglm files, but
for models that the original remote code doesn't know, which have a config.json of the glm layout.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from glm3cli.checkpoint.layouts.complete import complete, write_content
from glm3cli.checkpoint.locate import locate
from glm3cli.checkpoint.names import Layout
from glm3cli.config.family.recognise import known
from glm3cli.config.model import DTYPE_NAMES, RENAMED, ModelConfig, is_glm
from glm3cli.data.tokens.added import ADDED_NAME
from glm3cli.data.tokens.fast.tokenizer import to_fast, to_fast_config
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.data.tokens.vocabulary.files import FILE_NAME, JSON_NAME, usual_name
from glm3cli.data.tokens.vocabulary.opening import kind_of
from glm3cli.data.tokens.vocabulary.pieces import Pieces
from glm3cli.errors import CheckpointError, DataError
from glm3cli.host.parsing import read_json

_GENERATION = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
# Its entries that are made anew, or that say how the file came about.
_REPLACED = frozenset(
    {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "_from_model_config"}
)
COMPANIONS = (
    FILE_NAME,
    JSON_NAME,
    _TOKENIZER_CONFIG,
    ADDED_NAME,
    "special_tokens_map.json",
    "tokenization_chatglm.py",
    "configuration_chatglm.py",
    "modeling_chatglm.py",
    "quantization.py",
    _GENERATION,
)


def copy_companions(
    source: Path, target: Path, model: ModelConfig, layout: Layout = "mcore"
) -> None:
    """Puts the files that a model needs beside its weights into `target`.

    For the glm layout they are made; for the others they are copied byte by byte, and those of the
    chatglm layout then completed. From a glm folder to another layout only tokenizer.model is
    copied, and what lists tokens that other models don't have: the rest is for transformers.

    config.json is rewritten only where it describes another model than `model` (after a cast, for
    instance), and made from `model` where there is none.

    Args:
        source: A model in any layout, or another folder with such files.
        target: The folder to complete.
        model: The shape of the model whose weights lie in `target`.
        layout: The layout of these weights.

    Raises:
        DataError: The layout is glm, and transformers can't do what the tokenizer does.
    """
    if layout == "glm":
        _write_glm_files(target, model, source)
        return
    places = _places(source)
    config = _find(places, "config.json")
    is_other = config is not None and is_glm(config)
    tokenizer = _readable_tokenizer(source) if is_other else None
    for name in _tokenizer_names(tokenizer) if is_other else COMPANIONS:
        found = _find(places, name)
        if found is not None:
            shutil.copyfile(found, target / name)
    if is_other:
        config = None
    if tokenizer is not None:
        _write_model(tokenizer, target)
    content = _fresh(source, model) if config is None else _updated(config, model)
    if config is not None and content == read_json(config):
        shutil.copyfile(config, target / "config.json")
    else:
        write_content(target / "config.json", content)
    if layout == "chatglm":
        complete(target, stop_tokens, model.seq_length)


def copy_tokenizer(vocabulary: Path, target: Path) -> None:
    """Puts a vocabulary into a model's folder, and what lists tokens beside it in its own folder.

    Args:
        vocabulary: The vocabulary's file, which may be that of another folder than the model's.
        target: The folder of the model.
    """
    shutil.copyfile(vocabulary, target / usual_name(vocabulary))
    for name in (ADDED_NAME, _TOKENIZER_CONFIG):
        if (vocabulary.parent / name).is_file():
            shutil.copyfile(vocabulary.parent / name, target / name)


def find_companion(source: Path, name: str) -> Path | None:
    """Returns the path of the file `name` of a model, or of another folder with such files.

    Args:
        source: A model in any layout, or another folder.
        name: The file's name, such as tokenizer.model.

    Returns:
        The path, or None if there is no such file.
    """
    return _find(_places(source), name)


def tokenizer_of(source: Path) -> Tokenizer | None:
    """Returns the tokenizer of a model, or of another folder with such files; None without one.

    Raises:
        DataError: The file isn't a vocabulary.
    """
    file = tokenizer_file(source)
    return Tokenizer.load(file) if file else None


def tokenizer_file(source: Path) -> Path | None:
    """Returns the path of a model's vocabulary, as `find_companion` finds it; None without one."""
    found = (find_companion(source, name) for name in (FILE_NAME, JSON_NAME))
    return next(filter(None, found), None)


def _tokenizer_names(tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """Returns the names of the tokenizer's files in a glm folder that another layout needs.

    Where there is a tokenizer.model, the others are needed only if they list other tokens beside
    the vocabulary than the table has.
    """
    if tokenizer is not None and tokenizer.path.name == FILE_NAME and tokenizer.is_usual:
        return (FILE_NAME,)
    return (FILE_NAME, JSON_NAME, ADDED_NAME, _TOKENIZER_CONFIG)


def _write_model(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the vocabulary to a folder as a tokenizer.model, if it can be one."""
    if tokenizer.path.name == FILE_NAME:
        shutil.copyfile(tokenizer.path, folder / FILE_NAME)
    elif isinstance(tokenizer.vocabulary, Pieces):
        (folder / FILE_NAME).write_bytes(tokenizer.vocabulary.serialized)


def _readable_tokenizer(source: Path) -> Tokenizer | None:
    """Returns the tokenizer of a model; None without one, or if whoever uses it will refuse it."""
    with suppress(DataError):
        return tokenizer_of(source)
    return None


def stop_tokens(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns the ids that end and pad a reply, under their names in transformers' config files.

    Args:
        tokenizer: The model's tokenizer; without one only the ids that ChatGLM3 fixes are known.
    """
    if tokenizer is None:
        return {"eos_token_id": [2], "pad_token_id": 0}
    return {"eos_token_id": list(tokenizer.ends), "pad_token_id": tokenizer.pad_id}


def _fresh(source: Path, model: ModelConfig) -> dict[str, Any]:
    """Returns the content of a new config.json beside weights that aren't in the layout glm."""
    content = _name(source) | model.to_config()
    file = tokenizer_file(source)
    # The original config.json of models with sentencepiece names the end token alone.
    if file is not None and kind_of(file) == "tiktoken":
        content |= stop_tokens(Tokenizer.load(file))
    return content


def _name(source: Path) -> dict[str, Any]:
    """Returns the name of the model as a config.json holds it; nothing if it isn't known."""
    config = find_companion(source, "config.json")
    member = known(config.parent) if config else None
    return {"_name_or_path": member.repository} if member else {}


def _write_glm_files(folder: Path, model: ModelConfig, source: Path) -> None:
    """Writes what transformers' own class needs: config, generation config and tokenizer.

    There is a tokenizer.model as well where the vocabulary can be one; glm3 itself reads it.
    """
    tokenizer = tokenizer_of(source)
    if tokenizer is not None:
        write_content(folder / "tokenizer.json", to_fast(tokenizer))
        write_content(folder / _TOKENIZER_CONFIG, to_fast_config(tokenizer, model.seq_length))
        _write_model(tokenizer, folder)
    stops = stop_tokens(tokenizer)
    write_content(folder / "config.json", _name(source) | model.to_glm() | stops)
    write_content(folder / _GENERATION, _sampling(source) | stops)


def _sampling(source: Path) -> dict[str, Any]:
    """Returns what a model's generation_config.json says, but for the ids, which the tokenizer has.

    Servers sample by it where a request doesn't say how.

    Raises:
        CheckpointError: The file holds no JSON object.
    """
    file = find_companion(source, _GENERATION)
    if file is None:
        return {}
    try:
        values = read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}", "mend or remove the file") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object", "mend or remove the file")
    return {name: value for name, value in values.items() if name not in _REPLACED}


def _updated(config: Path, model: ModelConfig) -> dict[str, Any]:
    """Returns a config.json's content with the values that `model` has differently.

    Everything else in it, such as auto_map, stays.
    """
    raw: dict[str, Any] = read_json(config)
    new, old = model.to_hf(), ModelConfig.from_file(config).to_hf()
    changes = {name: value for name, value in new.items() if value != old.get(name)}
    for name in DTYPE_NAMES:  # which may be of another spelling, or say that fp32 was fp64
        if name in raw and (raw[name] is not None or "torch_dtype" in changes):
            changes[name] = new["torch_dtype"]
    for other, name in RENAMED.items():  # GLM-4's has both, and llama.cpp's converter reads these
        if other in raw and name in changes:
            changes[other] = changes[name]
    return raw | changes


def _places(source: Path) -> list[Path]:
    """Returns the folders in which the files of a model may lie, the given one first."""
    try:
        location = locate(source)
    except CheckpointError:
        return [source]
    above = [location.config.parent] if location.config else []
    return list(dict.fromkeys([source, *above, location.folder]))


def _find(places: list[Path], name: str) -> Path | None:
    """Returns the path of the first file of this name in the folders, or None."""
    return next((place / name for place in places if (place / name).is_file()), None)
