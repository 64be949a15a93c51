"""Reads and writes the config.json of transformers' own GlmForCausalLM.

That class computes what ChatGLM3 computes. GLM-4 and other models use it with other settings; a
config.json that can't be that of a ChatGLM3 model is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm3cli.errors import CheckpointError

MODEL_TYPE = "glm"
_BASE = 10_000.0
# The fields of `ModelConfig`, and what a GLM config.json calls them.
_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "padded_vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
}
# Fields that have the same value in every ChatGLM3 model. Where a file leaves them out, GlmConfig
# (transformers 5.23, configuration_glm.py) takes these values, too.
_FIXED: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": True,
    "tie_word_embeddings": False,
    "rope_type": "default",
    "partial_rotary_factor": 0.5,
}
# The fields of `_FIXED` that stand beside the rotary base, in `rope_parameters`.
_ROPE = ("rope_type", "partial_rotary_factor")


def from_glm(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Reads a GLM config.json.

    Args:
        raw: The content of the config.json.
        path: The file's path, for the messages.

    Returns:
        The values of a `ModelConfig`, without `torch_dtype`.

    Raises:
        CheckpointError: A field is missing, or ChatGLM3 models have another value in it.
    """
    missing = [name for name in _FIELDS.values() if name not in raw]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}",
            "take the config.json that belongs to these weights",
        )
    found = raw | _rope(raw)
    for name, value in _FIXED.items():
        if found.get(name, value) != value:
            raise CheckpointError(
                f"{path} has {name} {found[name]!r}",
                f"glm3 takes GLM models with {name} {value!r}; others don't compute as ChatGLM3",
            )
    theta = found.get("rope_theta", _BASE)
    if not isinstance(theta, int | float):
        raise CheckpointError(f"{path} has rope_theta {theta!r}", "it must be a number")
    values = {ours: raw[name] for ours, name in _FIELDS.items()}
    return values | {"rope_ratio": theta / _BASE}


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the rotary parameters: transformers 5 nests them, 4 has them at the top."""
    rope: dict[str, Any] = {
        name: raw[name] for name in ("rope_theta", "partial_rotary_factor") if name in raw
    }
    for name in ("rope_scaling", "rope_parameters"):
        nested = raw.get(name) or {}
        rope |= nested if isinstance(nested, dict) else {"rope_type": nested}
    return rope


def to_glm(shape: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the content of a GLM config.json that both transformers 4 and 5 read.

    Args:
        shape: The values of a `ModelConfig`.
        dtype: The type of the weights by transformers' name, such as `bfloat16`.
    """
    rope = {"rope_theta": _BASE * shape["rope_ratio"], **{name: _FIXED[name] for name in _ROPE}}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["GlmForCausalLM"],
        **{name: shape[ours] for ours, name in _FIELDS.items()},
        **{name: value for name, value in _FIXED.items() if name not in _ROPE},
        "attention_dropout": 0.0,
        "rope_parameters": rope,
        # transformers 4 looks for these at the top.
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
