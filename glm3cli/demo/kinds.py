"""The kinds of models that the demo can be of, as data: what differs between them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glm3cli.config.demo import Family
from glm3cli.config.family.members import GLM4
from glm3cli.config.model import ModelConfig
from glm3cli.demo import content
from glm3cli.demo.ranks import train_ranks, write_ranks


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        model: The shape of the model.
        write_tokenizer: Writes the files of a tokenizer into a folder.
        finetune: The recipe of the finetuning.
        handler: The options of `preprocess` for the rows of the finetuning.
        rows: The rows of the finetuning.
        calls: Held-out conversations in which a tool is called; empty if the demo calls none.
    """

    model: ModelConfig
    write_tokenizer: Callable[[Path], None]
    finetune: content.Recipe
    handler: tuple[str, ...]
    rows: Sequence[dict[str, Any]]
    calls: Sequence[dict[str, Any]] = ()


def kind_of(family: Family) -> Kind:
    """Returns the kind of model of a family."""
    return _glm4() if family == "glm4" else _chatglm3()


def _chatglm3() -> Kind:
    return Kind(
        content.MODEL,
        content.train_tokenizer,
        content.FINETUNE,
        ("--handler", "instruction", "--template", "chatglm3"),
        content.training_rows(),
    )


def _glm4() -> Kind:
    """Returns GLM-4-9B's kind, whose finetuning has the same task and calls of a tool."""
    traits = {"layernorm_epsilon": 1.5625e-07, "rope_ratio": 500.0}
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in content.training_rows()
    ]
    return Kind(
        content.MODEL.model_copy(update=traits),
        _write_ranks,
        replace(content.FINETUNE, seq_length=48, train_iters=400),
        ("--handler", "chat"),
        rows + content.call_rows(held_out=False),
        content.call_rows(held_out=True),
    )


def _write_ranks(folder: Path) -> None:
    """Writes a vocabulary of GLM-4's kind and its config into a folder."""
    calls = [json.dumps(row["messages"]) for row in content.call_rows(held_out=False)[::8]]
    size = content.MODEL.padded_vocab_size - len(GLM4.special)
    folder.mkdir(parents=True, exist_ok=True)
    write_ranks(folder / "tokenizer.model", train_ranks(content.tokenizer_texts() + calls, size))
    config = {"name_or_path": "glm3-demo", "tokenizer_class": "ChatGLM4Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
