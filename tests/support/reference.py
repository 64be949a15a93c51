"""The reference: transformers' own classes with the weights of a checkpoint of the family."""

from typing import Any

import torch
from torch import Tensor

from glm3cli.checkpoint.names import Weight, weights_of
from glm3cli.config import glm
from glm3cli.config.model import ModelConfig

# Canonical weight -> the parameters of GlmForCausalLM that it is made of, row by row.
_GLM = {
    "embedding": ["model.embed_tokens.weight"],
    "input_norm": ["model.layers.{}.input_layernorm.weight"],
    "qkv_weight": [f"model.layers.{{}}.self_attn.{p}_proj.weight" for p in "qkv"],
    "qkv_bias": [f"model.layers.{{}}.self_attn.{p}_proj.bias" for p in "qkv"],
    "attention_out": ["model.layers.{}.self_attn.o_proj.weight"],
    "mlp_norm": ["model.layers.{}.post_attention_layernorm.weight"],
    "mlp_up": ["model.layers.{}.mlp.gate_up_proj.weight"],
    "mlp_down": ["model.layers.{}.mlp.down_proj.weight"],
    "final_norm": ["model.norm.weight"],
    "output": ["lm_head.weight"],
    "attention_out_norm": ["model.layers.{}.post_self_attn_layernorm.weight"],
    "mlp_out_norm": ["model.layers.{}.post_mlp_layernorm.weight"],
}


def names(weight: Weight, layer: int | None) -> list[str]:
    """The parameters of GlmForCausalLM that make up one canonical weight."""
    return [name.format(layer) for name in _GLM[weight.logical]]


def all_slots(model: ModelConfig) -> list[tuple[Weight, int | None]]:
    """Every weight with its layer."""
    return [
        (weight, layer)
        for weight in weights_of(model)
        for layer in (range(model.num_layers) if "{}" in weight.mcore else (None,))
    ]


def build(model: ModelConfig, source: Any) -> Any:
    """GlmForCausalLM, or Glm4ForCausalLM with sandwich norms, in fp32 with `source`'s weights."""
    from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM

    classes = (Glm4ForCausalLM, Glm4Config) if model.sandwich_norms else (GlmForCausalLM, GlmConfig)
    native = classes[0](
        classes[1](
            vocab_size=model.padded_vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            head_dim=model.kv_channels,
            partial_rotary_factor=0.5,
            attention_bias=model.add_qkv_bias,
            rms_norm_eps=model.layernorm_epsilon,
            tie_word_embeddings=False,
            max_position_embeddings=model.seq_length,
            rope_parameters=glm.to_glm(model.model_dump(), "float32")["rope_parameters"],
            pad_token_id=None,  # a padding_idx would drop the gradient of token 0
        )
    ).float()
    parameters = dict(native.named_parameters())
    with torch.no_grad():
        for weight, layer in all_slots(model):
            parts = [parameters.pop(name) for name in names(weight, layer)]
            pieces = source.read(weight, layer).split([len(part) for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                part.copy_(piece)
    assert not parameters, parameters.keys()
    return native


def gradients(model: ModelConfig, glm: Any) -> dict[str, Tensor]:
    """The gradient of every canonical weight, under its Hugging Face name."""
    parameters = dict(glm.named_parameters())
    return {
        weight.name("chatglm", layer): torch.cat(
            [parameters[name].grad for name in names(weight, layer)]
        )
        for weight, layer in all_slots(model)
    }
