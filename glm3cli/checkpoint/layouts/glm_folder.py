"""The files beside the weights of a `glm` folder, with which transformers needs no remote code."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from glm3cli.config.model import ModelConfig
from glm3cli.data.tokens.fast_tokenizer import to_fast, to_fast_config
from glm3cli.data.tokens.tokenizer import FILE_NAME, Tokenizer

# A reply ends where someone else's turn begins.
_ENDS = ("<|user|>", "<|observation|>")
_log = logging.getLogger(__name__)


def write_glm_files(folder: Path, model: ModelConfig, tokenizer_file: Path | None) -> None:
    """Writes config, generation config and tokenizer; the latter also as glm3 itself reads it.

    Raises:
        DataError: transformers can't do what the tokenizer does.
    """
    eos = [Tokenizer.eos_id]
    if tokenizer_file is None:
        _log.warning("there is no %s, so the new folder has no tokenizer", FILE_NAME)
    else:
        tokenizer = Tokenizer.load(tokenizer_file)
        eos += [tokenizer.special(name) for name in _ENDS]
        _write(folder / "tokenizer.json", to_fast(tokenizer))
        _write(folder / "tokenizer_config.json", to_fast_config(tokenizer, model.seq_length))
        shutil.copyfile(tokenizer_file, folder / FILE_NAME)
    ends = {"eos_token_id": eos, "pad_token_id": Tokenizer.pad_id}
    _write(folder / "config.json", model.to_glm() | ends)
    _write(folder / "generation_config.json", ends)


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
