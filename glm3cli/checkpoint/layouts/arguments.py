"""Translates between a model's shape and the command line that Megatron saves in per-rank files.

Only the arguments that Megatron-LM core_r0.6.0 and ModelLink 1.1 read back are written
(load_args_from_checkpoint and check_checkpoint_args in megatron/training/checkpointing.py).
"""

import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.device.dtypes import TORCH_DTYPES, dtype_name
from glm3cli.errors import CheckpointError, ConfigError

_BASE = 10_000.0  # of the rotary frequencies, where rope_ratio is 1
_ROTARY_SHARE = 0.5  # of each head that the family rotates
_log = logging.getLogger(__name__)
# The arguments that are the same on all ranks of a run; others, such as the rank, differ.
_OF_THE_RUN = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "padded_vocab_size",
    "params_dtype",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "seed",
    "lr",
    "train_iters",
    "global_batch_size",
    "consumed_train_samples",
)


def run_of(saved: Mapping[str, Any]) -> dict[str, object]:
    """Returns the values that tell which run, and which iteration of it, a rank file comes from.

    Args:
        saved: The content of the rank file.
    """
    arguments = saved.get("args")
    given = vars(arguments) if isinstance(arguments, Namespace) else {}
    return {"iteration": saved.get("iteration")} | {name: given.get(name) for name in _OF_THE_RUN}


def model_of(arguments: object, vocabulary: int | None, path: Path) -> ModelConfig:
    """Returns the model's shape that saved arguments describe.

    ModelLink leaves the rotary base empty, so that rope_ratio is 1 there; MindSpeed-LLM notes the
    one that its script gave, and glm3 rope_ratio itself.

    Args:
        arguments: What the rank file has under `args`.
        vocabulary: The number of rows of the whole embedding, which is taken where the arguments
            don't name the size of the vocabulary.
        path: The rank file, for messages.

    Raises:
        CheckpointError: There are no arguments, or they describe no ChatGLM2 or ChatGLM3 model.
    """
    if not isinstance(arguments, Namespace):
        raise CheckpointError(
            f"{path} has no saved arguments, and there is no config.json beside it",
            "put the model's config.json into the folder",
        )
    given = vars(arguments)
    share = given.get("rotary_percent")
    if given.get("use_glm_rope") and isinstance(share, float) and share != _ROTARY_SHARE:
        _log.warning(
            "%s was trained with rotary_percent %s, where the family rotates %s of each head: "
            "glm3 computes as the family does",
            path,
            share,
            _ROTARY_SHARE,
        )
    try:
        return ModelConfig.parse(_values(given, vocabulary))
    except ConfigError as error:
        raise CheckpointError(
            f"the arguments in {path} don't describe a ChatGLM model: {error.message}",
            "put the model's config.json into the folder",
        ) from None


def _values(given: dict[str, Any], vocabulary: int | None) -> dict[str, Any]:
    """Returns the fields of a `ModelConfig` that saved arguments contain."""
    heads, hidden = given.get("num_attention_heads"), given.get("hidden_size")
    channels = given.get("kv_channels")
    if channels is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
        channels = hidden // heads
    dtype = given.get("params_dtype", torch.float16)
    values = {
        "num_layers": given.get("num_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": given.get("ffn_hidden_size"),
        "num_attention_heads": heads,
        "num_query_groups": given.get("num_query_groups")
        if given.get("group_query_attention")
        else heads,
        "kv_channels": channels,
        "padded_vocab_size": given.get("padded_vocab_size") or vocabulary,
        "seq_length": given.get("seq_length"),
        "layernorm_epsilon": given.get("norm_epsilon", given.get("layernorm_epsilon")),
        "rope_ratio": given.get("rope_ratio") or _ratio_of(given.get("rotary_base")),
        "rope_factor": given.get("rope_factor"),
        "add_qkv_bias": given.get("add_qkv_bias"),
        "sandwich_norms": given.get("sandwich_norms") or given.get("post_norm"),
        "torch_dtype": dtype_name(dtype) if dtype in TORCH_DTYPES.values() else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _ratio_of(base: object) -> float | None:
    """Returns the rope_ratio that belongs to a rotary base; None if there is no base."""
    has = isinstance(base, int | float) and not isinstance(base, bool) and base > 0
    return float(base) / _BASE if has and isinstance(base, int | float) else None


def arguments_of(
    model: ModelConfig, parallel: ModelParallelConfig, dtype: torch.dtype, *, is_mcore: bool
) -> Namespace:
    """Returns the arguments to save in the rank files of a model.

    Args:
        model: The model's shape.
        parallel: The parallel sizes that the files are cut for.
        dtype: The type of the weights.
        is_mcore: Whether the layout is mcore; if not, it is legacy.
    """
    per_chunk = model.num_layers // (parallel.pp * parallel.vpp) if parallel.vpp > 1 else None
    return Namespace(
        num_layers=model.num_layers,
        encoder_num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        seq_length=model.seq_length,
        max_position_embeddings=model.seq_length,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        group_query_attention=True,
        kv_channels=model.kv_channels,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_percent=0.5 if is_mcore else 1.0,
        rotary_interleaved=is_mcore,
        rotary_base=None,
        rope_ratio=model.rope_ratio,
        **({} if model.rope_factor == 1 else {"rope_factor": model.rope_factor}),
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        **({"sandwich_norms": True} if model.sandwich_norms else {}),
        swiglu=True,
        untie_embeddings_and_output_weights=True,
        apply_layernorm_1p=False,
        normalization="RMSNorm",
        norm_epsilon=model.layernorm_epsilon,
        tokenizer_type="Llama2Tokenizer",
        padded_vocab_size=model.padded_vocab_size,
        vocab_size=model.padded_vocab_size,
        make_vocab_size_divisible_by=1,
        apply_query_key_layer_scaling=False,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        num_layers_per_virtual_pipeline_stage=per_chunk,
        num_layer_list=parallel.layers_per_stage,
        params_dtype=dtype,
        fp16=dtype is torch.float16,
        bf16=dtype is torch.bfloat16,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        bert_binary_head=True,
        model_type="encoder_or_decoder",
        transformer_impl="local",
        use_mcore_models=is_mcore,
        iteration=1,
    )
