"""The forward pass in plain torch against the original code and against GlmForCausalLM.

Tolerance 1e-4, as in test_golden_logits.
"""

import torch

from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.checkpoint.names import WEIGHTS, slots
from glm3cli.config.model import ModelConfig
from glm3cli.model.plain import plain_logits
from tests.support import reference
from tests.support.checkpoints import write_hf
from tests.support.shared import GOLDEN, needs_shared

TOLERANCE = 1e-4
BY_NAME = {weight.logical: weight for weight in WEIGHTS}


def logits_of(source, tokens):
    def read(name, layer):
        return source.read(BY_NAME[name], layer)

    return plain_logits(source.model, read, tokens)


@needs_shared
def test_golden_logits():
    from safetensors.torch import load_file

    golden = load_file(GOLDEN / "logits.safetensors")
    source = open_source(GOLDEN / "hf_tiny")
    for case in ("len7", "len33", "len128"):
        for ids, expected in zip(
            golden[f"{case}.input_ids"], golden[f"{case}.logits"], strict=True
        ):
            assert (logits_of(source, ids) - expected).abs().max() < TOLERANCE


def test_transformers(tmp_path):
    model = ModelConfig(
        num_layers=3,
        hidden_size=24,
        ffn_hidden_size=40,
        num_attention_heads=6,
        num_query_groups=3,
        kv_channels=8,
        padded_vocab_size=56,
        seq_length=32,
        layernorm_epsilon=1e-3,
        rope_ratio=50,
        rope_factor=3,
        torch_dtype="fp32",
    )
    generator = torch.Generator().manual_seed(2)
    weights = {
        weight.name("chatglm", layer): torch.randn(weight.shape(model), generator=generator) / 4
        for weight, layer in slots(model)
    }
    folder = write_hf(tmp_path / "hf", model=model, weights=weights)
    source = open_source(folder)
    assert source.model.rope_factor == 3
    tokens = torch.randint(model.padded_vocab_size, (31,), generator=generator)
    with torch.no_grad():
        expected = reference.build(model, source)(tokens.unsqueeze(0)).logits[0]
    assert (logits_of(source, tokens) - expected).abs().max() < TOLERANCE
