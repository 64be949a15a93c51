"""`complete`: puts into a chatglm folder what other programs need to load it as it is.

The original models have code of their own for config, model and tokenizer, which config.json and
tokenizer_config.json name in `auto_map`. Whoever follows it to a file that isn't there stops. A
folder without the tokenizer's code gets a tokenizer.json, with which transformers and vLLM need
none.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from glm3cli.config.family.recognise import recognise
from glm3cli.config.model import ModelConfig
from glm3cli.data.tokens.fast.tokenizer import to_fast, to_fast_config
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError
from glm3cli.host.parsing import read_json

_NAME = "_name_or_path"
_CODE = "auto_map"


def complete(
    folder: Path, stops: Callable[[Tokenizer | None], dict[str, Any]], length: int
) -> None:
    """Completes the files of a model in the chatglm layout.

    - config.json gets the name of the model, by which MindIE and llama.cpp choose their code, and
      the size of a vocabulary of tiktoken's, which llama.cpp reads.
    - What `auto_map` names, but isn't there, is dropped.
    - Without the tokenizer's code, tokenizer.json and its config are written, with the chat
      template.
    - generation_config.json says which tokens end an answer, if nothing does.

    Args:
        folder: The folder, with its config.json.
        stops: Returns the ids that end and pad an answer, by their names in transformers' config
            files, of a tokenizer.
        length: The longest sequence that the model was trained on, in tokens.
    """
    config = read_json(folder / "config.json")
    tokenizer = None
    with suppress(DataError):
        tokenizer = Tokenizer.load(folder)
    member = tokenizer.member if tokenizer else recognise(folder)
    changes: dict[str, Any] = {} if config.get(_NAME) else {_NAME: member.repository}
    if member.tokens.kind == "tiktoken" and "vocab_size" not in config:
        changes["vocab_size"] = ModelConfig.from_file(folder).padded_vocab_size
    _replace(folder / "config.json", config, changes | _without_missing(config, folder))
    if not (folder / "generation_config.json").exists():
        write_content(folder / "generation_config.json", stops(tokenizer))
    path = folder / "tokenizer_config.json"
    if tokenizer is not None and not any(folder.glob("tokenization_*.py")):
        with suppress(DataError):  # no tokenizer.json can do what this tokenizer does
            write_content(folder / "tokenizer.json", to_fast(tokenizer))
            write_content(path, to_fast_config(tokenizer, length))
            return
    tokens = read_json(path) if path.is_file() else {}
    _replace(path, tokens, _without_missing(tokens, folder))


def missing_code(content: Mapping[str, Any], folder: Path) -> list[str]:
    """Returns the names of the files that `auto_map` of a config file names, but aren't there.

    Args:
        content: The content of the config file.
        folder: Its folder.
    """
    found = content.get(_CODE)
    entries = [entry for value in found.values() for entry in _entries(value)] if found else []
    names = {f"{entry.rpartition('--')[2].partition('.')[0]}.py" for entry in entries}
    return sorted(name for name in names if not (folder / name).is_file())


def _without_missing(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns an `auto_map` without what isn't there; nothing if all is."""
    missing = missing_code(content, folder)
    if not missing:
        return {}
    kept = {
        name: value
        for name, value in content[_CODE].items()
        if not missing_code({_CODE: {name: value}}, folder)
    }
    return {_CODE: kept}


def _entries(value: Any) -> list[str]:
    """Returns the classes that a value of `auto_map` names: one, or a slow and a fast one."""
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]


def _replace(path: Path, content: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Writes a config file again if anything in it changes; an empty `auto_map` is left out."""
    if not changes:
        return
    new = {**changes, **content, **changes} if _NAME in changes else content | dict(changes)
    write_content(path, {k: v for k, v in new.items() if not (k == _CODE and not v)})


def write_content(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file as transformers formats them."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
