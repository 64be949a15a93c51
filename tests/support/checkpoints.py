"""Writes small random models in the chatglm layout, reads them, and compares them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.checkpoint.names import WEIGHTS, Stage, slots
from glm3cli.config.model import ModelConfig
from tests.support.weights import weights_of

# hidden_size differs from heads x kv_channels, and nothing else is equal by chance.
SMALL = ModelConfig(
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=4,
    padded_vocab_size=56,
    seq_length=32,
    torch_dtype="fp16",
)


def random_weights(model: ModelConfig = SMALL, dtype: torch.dtype = torch.float16) -> dict:
    """Returns random tensors for all weights, by their names in the chatglm layout."""
    generator = torch.Generator().manual_seed(1)
    return {
        weight.name("chatglm", layer): torch.randn(weight.shape(model), generator=generator).to(
            dtype
        )
        for weight, layer in slots(model)
    }


def write_hf(
    folder: Path,
    *,
    model: ModelConfig = SMALL,
    weights: dict[str, Tensor] | None = None,
    kind: str = "safetensors",
    shards: int = 1,
    tokenizer: bytes = b"pieces",
) -> Path:
    """Writes a Hugging Face folder: config.json, weights, and made-up companions.

    Args:
        folder: The new folder, which is returned.
        model: The model's shape.
        weights: The tensors by name; random ones if None.
        kind: The files of weights: "safetensors" or "bin".
        shards: The number of files of weights.
        tokenizer: The content of its tokenizer.model, which by default can't be read.
    """
    folder.mkdir(parents=True)
    weights = random_weights(model) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(model.to_config()))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenization_chatglm.py").write_text("# code\n")
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    names, places = list(weights), {}
    for i in range(shards):
        part = {name: weights[name] for name in names[i::shards]}
        number = f"-{i + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        file = folder / f"{stem}{number}.{kind}"
        if kind == "safetensors":
            save_file(part, file, metadata={"format": "pt"})
        else:
            torch.save(part, file)
        places |= dict.fromkeys(part, file.name)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def read_all(path: Path) -> dict[str, Tensor]:
    """Returns all canonical tensors of a model, by their names in the chatglm layout."""
    return weights_of(open_source(path))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Asserts that names, types, shapes and values are equal, the values bit by bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(
            found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        ), name


def layer_weights() -> list:
    """Returns the rows of the table of weights that every layer has."""
    return [weight for weight in WEIGHTS if weight.stage is Stage.LAYER]
