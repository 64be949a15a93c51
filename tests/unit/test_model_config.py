"""The shape of a model: the config.json files that give it, and those that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from glm3cli.config.model import ModelConfig
from glm3cli.config.presets import PRESETS
from glm3cli.errors import CheckpointError
from tests.support.shared import SHARED, needs_shared
from tests.support.tiny import TINY

SIX_B = PRESETS["6b"]


def write(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """A config.json of the 6B model with some fields changed or left out."""
    raw = {**SIX_B.to_hf(), **changes}
    file = folder / "config.json"
    file.write_text(json.dumps({key: value for key, value in raw.items() if key not in drop}))
    return file


@needs_shared
def test_the_real_config_is_the_6b_model():
    model = ModelConfig.from_file(SHARED / "chatglm3-6b")
    assert model == PRESETS["6b"]
    assert model.num_parameters == 6_243_584_000


def test_a_folder_and_its_config_file_are_the_same(tmp_path):
    file = write(tmp_path)
    assert ModelConfig.from_file(file) == ModelConfig.from_file(tmp_path) == SIX_B


@pytest.mark.parametrize("model", [SIX_B, TINY, PRESETS["tiny"]], ids=["6b", "test", "tiny"])
def test_to_hf_and_back_is_the_same_model(model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(model.to_hf()))
    assert ModelConfig.from_file(tmp_path) == model


def test_without_multi_query_attention_every_head_is_its_own_group(tmp_path):
    assert (
        ModelConfig.from_file(write(tmp_path, multi_query_attention=False)).num_query_groups == 32
    )
    assert (
        ModelConfig.from_file(write(tmp_path, drop=("multi_query_attention",))).num_query_groups
        == 32
    )


def test_the_number_of_groups_is_one_where_it_is_left_out(tmp_path):
    model = ModelConfig.from_file(write(tmp_path, drop=("multi_query_group_num",)))
    assert (model.num_query_groups, model.kv_size) == (1, 128)


def test_rope_ratio_stretches_the_rotary_base(tmp_path):
    assert ModelConfig.from_file(write(tmp_path, rope_ratio=50)).rotary_base == 500_000.0
    assert ModelConfig.from_file(write(tmp_path, drop=("rope_ratio",))).rotary_base == 10_000.0


def test_kv_channels_need_not_be_hidden_size_by_heads(tmp_path):
    model = ModelConfig.from_file(write(tmp_path, kv_channels=64))
    assert (model.query_size, model.kv_size, model.hidden_size) == (32 * 64, 2 * 64, 4096)
    # Per layer: two norms, qkv with bias, the attention's output, and the MLP's three matrices.
    qkv = (2048 + 2 * 128) * (4096 + 1)
    layer = 2 * 4096 + qkv + 2048 * 4096 + 3 * 13696 * 4096
    assert model.num_parameters == 28 * layer + 4096 + 2 * 65024 * 4096
    sandwiched = model.model_copy(update={"sandwich_norms": True})
    assert sandwiched.num_parameters == model.num_parameters + 28 * 2 * 4096


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, "bf16"),
        ({"dtype": "bfloat16"}, "bf16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "fp32"),
        ({}, "fp16"),
        ({"dtype": None, "torch_dtype": None}, "fp16"),
        ({"dtype": None, "torch_dtype": "torch.float32"}, "fp32"),
        ({"dtype": "float64"}, "fp32"),
    ],
    ids=str,
)
def test_the_type_of_the_weights_has_two_spellings(fields, expected, tmp_path):
    raw = {**SIX_B.to_hf(), **fields}
    if "torch_dtype" not in fields:
        del raw["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_file(tmp_path).torch_dtype == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "int8"}, "has dtype 'int8'"),
        ({"model_type": "llama"}, "is of the family 'llama'"),
        ({"position_encoding_2d": True}, "is of ChatGLM-6B, the first one"),
        ({"vision_config": {}}, "is of GLM-4V-9B: it has a tower that sees images"),
        ({"original_rope": False}, "is of CogAgent-9B: it sees images, and has another rotation"),
        ({"model_type": "glm4_moe"}, "is of GLM-4.5 or later: its MLPs are mixtures of experts"),
        ({"rmsnorm": False}, "has rmsnorm False"),
        ({"add_bias_linear": True}, "has add_bias_linear True"),
        ({"num_layers": "28"}, "num_layers 28: "),
        ({"num_layers": 0}, "num_layers 0: should be greater than or equal to 1"),
        ({"multi_query_group_num": 5}, "num_attention_heads 32 is not a multiple of"),
    ],
)
def test_another_shape_is_refused_with_its_value(changes, said, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_file(write(tmp_path, **changes))
    assert said in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


def test_all_missing_fields_are_named_at_once(tmp_path):
    with pytest.raises(CheckpointError, match="lacks num_layers, kv_channels"):
        ModelConfig.from_file(write(tmp_path, drop=("kv_channels", "num_layers")))


@pytest.mark.parametrize(
    ("content", "said"),
    [(b'{"model_type": ', "not valid JSON"), (b"\xff\xfe{}", "not valid JSON"), (b"[]", "no JSON")],
)
def test_a_damaged_file_is_refused(content, said, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        ModelConfig.from_file(tmp_path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        ModelConfig.from_file(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        ModelConfig.from_file(tmp_path / "nowhere")
