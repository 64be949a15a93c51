"""Reads and writes the config.json of transformers' own GlmForCausalLM and Glm4ForCausalLM.

The first computes what ChatGLM3 and GLM-4-9B compute; the second, that of GLM-4-0414, has two norms
more in each layer. Other models use them with other settings; a config.json that can't be of the
family is refused.
"""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm3cli.errors import CheckpointError

# The classes by their model types, and whether their layers have the two norms more.
CLASSES = {"glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM"}
_SANDWICHED = "glm4"
_BASE = 10_000.0
# The vocabulary of GLM-4-9B, and the positions of its models for long texts with their bases.
_GLM4_VOCABULARY, _LONG = 151_552, {131_072: 5e6, 1_048_576: 1e8}
_log = logging.getLogger(__name__)
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
# Fields that have the same value in every model of the family. Where a file leaves them out,
# GlmConfig (transformers 5.23, configuration_glm.py) takes these values, too.
_FIXED: dict[str, object] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "partial_rotary_factor": 0.5,
}
_PARTIAL = "partial_rotary_factor"  # the field of `_FIXED` that stands in `rope_parameters`
# How positions are scaled; transformers knows further ways, which change the frequencies.
_SCALINGS = ("default", "linear")


def from_glm(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Reads a GLM config.json.

    Args:
        raw: The content of the config.json.
        path: The file's path, for the messages.

    Returns:
        The values of a `ModelConfig`, without `torch_dtype`.

    Raises:
        CheckpointError: A field is missing, or the models of the family have another value in it.
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
                f"glm3 takes GLM models with {name} {value!r}; others compute something else",
            )
    theta = found.get("rope_theta", _BASE)
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise CheckpointError(f"{path} has rope_theta {theta!r}", "it must be a number")
    values = {ours: raw[name] for ours, name in _FIELDS.items()}
    _check_base(theta, raw, path)
    return values | {
        "rope_ratio": theta / _BASE,
        "rope_factor": _factor(found, path),
        "add_qkv_bias": raw.get("attention_bias", True),
        "sandwich_norms": raw["model_type"] == _SANDWICHED,
    }


def _check_base(theta: float, raw: Mapping[str, Any], path: Path) -> None:
    """Warns of a rotary base that an early conversion of GLM-4-9B's long models has lost.

    Their published -hf folders had 10,000 at first, and failed on long texts.
    """
    right = _LONG.get(raw["max_position_embeddings"])
    is_chat = raw["model_type"] != _SANDWICHED and raw["vocab_size"] == _GLM4_VOCABULARY
    if is_chat and right and theta == _BASE:
        _warn(f"{path} has rope_theta {theta:g}: for so many positions GLM-4-9B has {right:g}")


@functools.lru_cache(maxsize=16)
def _warn(sentence: str) -> None:
    """Logs a warning, once for all that read the file."""
    _log.warning("%s; set it, or long texts come out wrong", sentence)


def _factor(found: Mapping[str, Any], path: Path) -> float:
    """Returns the divisor of the positions, as transformers' linear RoPE scaling has it.

    Args:
        found: The content of the config.json with the rotary parameters at the top.
        path: The file's path, for the messages.

    Raises:
        CheckpointError: The scaling is another one, or its factor is wrong.
    """
    scaling = found.get("rope_type", "default")
    if scaling not in _SCALINGS:
        raise CheckpointError(
            f"{path} has the RoPE scaling {scaling!r}",
            f"glm3 computes {' and '.join(_SCALINGS)}; use a model without another scaling",
        )
    if scaling == "default":
        return 1.0
    factor = found.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor >= 1:
        raise CheckpointError(
            f"{path} has linear RoPE scaling with the factor {factor!r}",
            "it must be a number of at least 1",
        )
    return float(factor)


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the rotary parameters: transformers 5 nests them, 4 has most of them at the top.

    Transformers 4 called the kind of scaling `type` at first, and `rope_type` later, which counts
    where both are given. `rope_scaling` counts before `rope_parameters` (transformers 5.23,
    modeling_rope_utils.py, convert_rope_params_to_dict).
    """
    nested = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        nested = {"rope_type": nested}
    kind = {"rope_type": nested["type"]} if "type" in nested else {}
    return {name: raw[name] for name in ("rope_theta", _PARTIAL) if name in raw} | kind | nested


def to_glm(shape: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the content of a GLM config.json that both transformers 4 and 5 read.

    Args:
        shape: The values of a `ModelConfig`.
        dtype: The type of the weights by transformers' name, such as `bfloat16`.
    """
    scaling: dict[str, Any] = {"rope_type": "default"}
    if shape["rope_factor"] != 1:
        scaling = {"rope_type": "linear", "factor": shape["rope_factor"]}
    rope = {"rope_theta": _BASE * shape["rope_ratio"], _PARTIAL: _FIXED[_PARTIAL], **scaling}
    kind = _SANDWICHED if shape["sandwich_norms"] else "glm"
    return {
        "model_type": kind,
        "architectures": [CLASSES[kind]],
        **{name: shape[ours] for ours, name in _FIELDS.items()},
        **{name: value for name, value in _FIXED.items() if name != _PARTIAL},
        # MindIE and llama.cpp's converter read these alone, by the original names.
        **{name: shape[name] for name in ("rope_ratio", "layernorm_epsilon", "seq_length")},
        "attention_bias": shape["add_qkv_bias"],
        "attention_dropout": 0.0,
        "rope_parameters": rope,
        # transformers 4 looks for these at the top.
        "rope_theta": rope["rope_theta"],
        _PARTIAL: rope[_PARTIAL],
        **({"rope_scaling": scaling} if "factor" in scaling else {}),
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # Without it transformers 4.57 to 5.19 take the tokenizer for an old one of Mistral's, and
        # warn of wrong ids (tokenization_utils_tokenizers.py, _patch_mistral_regex).
        "transformers_version": "4.57.0",
    }
