"""`ModelConfig`: the shape of a model of the family, which is read from its config.json.

The file is that of the original remote code, or that of transformers' own GlmForCausalLM or
Glm4ForCausalLM (`glm`).
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from glm3cli.config import glm
from glm3cli.config.base import Settings
from glm3cli.config.family.recognise import rope_kind, rope_kind_by_values
from glm3cli.config.family.refused import refused
from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.host.parsing import read_json

# Fields with the same value in all models of the family; another value means another family.
_FIXED: dict[str, object] = {
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "tie_word_embeddings": False,
    "original_rope": True,
}
# Types of weights by transformers' names, and ours. Weights in fp64 are read as fp32.
_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp32"}
# Values of fields that older config.json files of the family leave out.
_DEFAULTS: dict[str, object] = {
    "layernorm_epsilon": 1e-5,
    "rope_ratio": 1.0,
    "rope_factor": 1.0,
    "add_qkv_bias": True,
}
_NEEDED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "padded_vocab_size",
    "seq_length",
)

# The names that transformers has for fields of the original config.json; some programs that tune
# or save a model write these alone.
RENAMED = {
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_hidden_size",
    "head_dim": "kv_channels",
    "vocab_size": "padded_vocab_size",
    "max_position_embeddings": "seq_length",
    "num_key_value_heads": "multi_query_group_num",
    "rms_norm_eps": "layernorm_epsilon",
}

# The names of the field with the type of the weights, the newer one first.
DTYPE_NAMES = ("dtype", "torch_dtype")
DType = Literal["fp32", "bf16", "fp16"]
# Size of one number of each type, in bytes.
DTYPE_BYTES: dict[DType, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


class ModelConfig(Settings):
    """The shape of one model, with the names of ChatGLM3's config.json.

    Attributes:
        num_layers: Number of transformer layers.
        hidden_size: Size of the hidden states between layers.
        ffn_hidden_size: Size of the hidden states inside an MLP, after SwiGLU.
        num_attention_heads: Number of query heads.
        num_query_groups: Number of key/value heads (`multi_query_group_num`; the number of query
            heads if `multi_query_attention` is false).
        kv_channels: Size of one head.
        padded_vocab_size: Number of rows of the embedding and of the output layer.
        seq_length: Length of the longest sequence that the model was trained on, in tokens.
        layernorm_epsilon: The number that RMSNorm adds to the mean of the squares.
        rope_ratio: Factor on the rotary base of 10,000 (above 1 in models for long texts).
        rope_factor: Divisor of the positions (transformers' linear RoPE scaling, Chen et al. 2023,
            "Extending context window of large language models via positional interpolation");
            chatglm2-6b-32k, whose config.json calls it rope_ratio, has 16.
        add_qkv_bias: Whether the projections of queries, keys and values have a bias; all have but
            GLM-4-32B-0414.
        sandwich_norms: Whether the outputs of attention and MLP are normalised, too, before they
            are added (Glm4ForCausalLM; Ding et al. 2021, "CogView", section 2.4).
        torch_dtype: Type of the weights in the checkpoint.
    """

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    ffn_hidden_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_query_groups: int = Field(ge=1)
    kv_channels: int = Field(ge=4, multiple_of=4)
    padded_vocab_size: int = Field(ge=1)
    seq_length: int = Field(ge=1)
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    rope_ratio: float = Field(default=1.0, gt=0)
    rope_factor: float = Field(default=1.0, ge=1)
    add_qkv_bias: bool = True
    sandwich_norms: bool = False
    torch_dtype: DType = "fp16"

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"multi_query_group_num {self.num_query_groups}"
            )
        return self

    @property
    def query_size(self) -> int:
        """Number of rows of the query projection: query heads x head size."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_size(self) -> int:
        """Number of rows of the key (or value) projection: key/value heads x head size."""
        return self.num_query_groups * self.kv_channels

    @property
    def rotary_base(self) -> float:
        """Base of the rotary frequencies: 10,000 x `rope_ratio`."""
        return 10_000.0 * self.rope_ratio

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the whole model."""
        h = self.hidden_size
        return self.num_layers * self.layer_parameters + h + 2 * self.padded_vocab_size * h

    @property
    def layer_parameters(self) -> int:
        """Number of parameters of each layer."""
        h = self.hidden_size
        qkv = (self.query_size + 2 * self.kv_size) * (h + self.add_qkv_bias)
        norms = (4 if self.sandwich_norms else 2) * h
        return norms + qkv + self.query_size * h + 3 * self.ffn_hidden_size * h

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Reads the shape from a config.json, of the original model or of transformers' own.

        Args:
            path: The file, or its folder.

        Raises:
            CheckpointError: The file is missing, isn't JSON, lacks a field, or is of another
                family.
        """
        path = path / "config.json" if path.is_dir() else path
        raw = _read(path)
        _check_kind(raw, path)
        values = glm.from_glm(raw, path) if is_glm(raw) else _from_chatglm(raw, path)
        try:
            return cls.parse({**values, "torch_dtype": _dtype(raw, path)})
        except ConfigError as error:
            raise CheckpointError(
                f"{path}: {error.message.replace('--', '').replace('-', '_')}",
                "take the config.json that belongs to these weights",
            ) from None

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a config.json for the original remote code (layout chatglm).

        A model whose positions are divided has the divisor as chatglm2-6b-32k has it, in
        rope_ratio. Where rope_ratio could be misread, `rope_kind`, which glm3 alone reads, says
        what it does.
        """
        shape = self.model_dump(
            exclude={"num_query_groups", "torch_dtype", "rope_factor", "sandwich_norms"}
        )
        if self.rope_factor != 1 and self.rope_ratio == 1:
            shape |= {"rope_ratio": self.rope_factor, "rope_kind": "positions"}
        elif self.rope_factor != 1:
            shape |= {"rope_factor": self.rope_factor}
        elif rope_kind_by_values(shape) != "base":
            shape |= {"rope_kind": "base"}
        return {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            **_FIXED,
            **shape,
            "apply_query_key_layer_scaling": True,
            "attention_dropout": 0.0,
            "attention_softmax_in_fp32": True,
            "bias_dropout_fusion": True,
            "fp32_residual_connection": False,
            "hidden_dropout": 0.0,
            "multi_query_attention": True,
            "multi_query_group_num": self.num_query_groups,
            "use_cache": True,
            "torch_dtype": self._long_dtype,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }

    def to_glm(self) -> dict[str, Any]:
        """Returns the content of a config.json for transformers' own classes (layout glm)."""
        return glm.to_glm(self.model_dump(), self._long_dtype)

    def to_config(self) -> dict[str, Any]:
        """Returns the content of the config.json beside weights in Megatron's layouts.

        It is that of the layout chatglm, unless the original remote code has no such model.
        """
        return self.to_glm() if self.sandwich_norms else self.to_hf()

    @property
    def _long_dtype(self) -> str:
        return next(long for long, short in _DTYPES.items() if short == self.torch_dtype)


def is_glm(config: dict[str, Any] | Path) -> bool:
    """Returns whether a config.json is that of transformers' own Glm or Glm4ForCausalLM.

    Args:
        config: The file, or its content.

    Raises:
        CheckpointError: The file is missing or isn't a JSON object.
    """
    raw = _read(config) if isinstance(config, Path) else config
    return raw.get("model_type") in tuple(glm.CLASSES)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist", "give a model folder that has a config.json"
        )
    try:
        raw = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", "fetch it again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds no JSON object", "fetch it again")
    return raw


def _dtype(raw: dict[str, Any], path: Path) -> str:
    """Returns the type of the weights.

    transformers 5 has renamed the field, and writes null where it isn't known; older files of the
    family leave it out.

    Raises:
        CheckpointError: It is one that isn't read.
    """
    given = (raw.get(name) for name in DTYPE_NAMES)
    dtype = next((one for one in given if one is not None), "float16")
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise CheckpointError(
            f"{path} has dtype {dtype!r}", f"it must be one of {', '.join(_DTYPES)}"
        )
    return found


def _check_kind(raw: dict[str, Any], path: Path) -> None:
    """Refuses checkpoints that hold something other than the model's weights in full precision."""
    relative = refused(raw)
    if relative:
        raise CheckpointError(
            f"{path} is of {relative.name}: {relative.reason}",
            "glm3 takes ChatGLM2, ChatGLM3, GLM-4-9B and GLM-4-0414 models, and those made of them",
        )
    bits, quantised = raw.get("quantization_bit"), raw.get("quantization_config")
    if bits or quantised:
        found = f"quantization_bit {bits}" if bits else "a quantization_config"
        raise CheckpointError(
            f"{path} has {found}: its weights are quantised, and glm3 reads unquantised ones",
            "take the model's fp16, bf16 or fp32 files, as THUDM/chatglm3-6b has them",
        )
    if raw.get("pre_seq_len"):
        raise CheckpointError(
            f"{path} has pre_seq_len {raw['pre_seq_len']}: it is of P-Tuning v2, whose prefix "
            "encoder glm3 doesn't run",
            "take the model that was tuned, without the prefix; or tune it anew with --lora-rank",
        )


def _from_chatglm(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Reads the original config.json: the values of a `ModelConfig`, without `torch_dtype`."""
    _check_family(raw, path)
    raw = {**{ours: raw[theirs] for theirs, ours in RENAMED.items() if theirs in raw}, **raw}
    missing = [name for name in _NEEDED if name not in raw]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}",
            "take the config.json that belongs to these weights",
        )
    values = {**_DEFAULTS, **{k: raw[k] for k in (*_NEEDED, *_DEFAULTS) if k in raw}}
    grouped = raw.get("multi_query_attention", "num_key_value_heads" in raw)
    values["num_query_groups"] = (
        raw.get("multi_query_group_num", 1) if grouped else raw["num_attention_heads"]
    )
    if rope_kind(raw, path) == "positions":
        values |= {"rope_ratio": 1.0, "rope_factor": values["rope_ratio"]}
    return values


def _check_family(raw: dict[str, Any], path: Path) -> None:
    if raw.get("model_type") != "chatglm":
        raise CheckpointError(
            f"{path} is of the family {raw.get('model_type')!r}",
            "glm3 takes models of ChatGLM2, ChatGLM3 and GLM-4 (model_type 'chatglm', 'glm' or "
            "'glm4')",
        )
    for name, value in _FIXED.items():
        if raw.get(name, value) != value:
            raise CheckpointError(
                f"{path} has {name} {raw[name]!r}",
                f"the models of the family have {name} {value!r}; others don't fit",
            )
