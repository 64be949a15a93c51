"""An adapter under the other layout's names is the same adapter, to us and to PEFT."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from glm3cli.checkpoint.convert.adapter import convert_adapter
from glm3cli.checkpoint.convert.convert import convert
from glm3cli.config.convert import ConvertOptions
from glm3cli.errors import CheckpointError, ConfigError
from tests.support import in_peft
from tests.support.adapters import (
    ALPHA,
    RANK,
    adapter_tensors,
    glm_adapter_tensors,
    glm_targets,
    with_lengths,
    write_adapter,
)
from tests.support.checkpoints import SMALL, random_weights, read_all, write_hf
from tests.support.programs import printed

# Sums of products of numbers around 1, in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
GLM_TARGETS = [name.split(".")[1] for name in glm_targets()]
QUERIES_ONLY = {k: v for k, v in glm_adapter_tensors().items() if ".q_proj" in k or ".v_proj" in k}
SOME_LAYERS = {k: v for k, v in adapter_tensors().items() if "layers.2." in k}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("source") / "hf")


def merged(hf, adapter):
    """All weights with the adapter, in fp32."""
    target = adapter.with_name(f"{adapter.name}-merged")
    convert(hf, target, ConvertOptions(layout="chatglm", dtype="fp32", lora=adapter))
    return read_all(target)


def tensors_of(adapter):
    return load_file(adapter / "adapter_model.safetensors")


CASES = {
    "chatglm": (adapter_tensors(), "glm", {}),
    "glm": (glm_adapter_tensors(), "chatglm", {"target_modules": GLM_TARGETS}),
    "same names": (adapter_tensors(), "chatglm", {}),
    "q and v only": (QUERIES_ONLY, "chatglm", {"target_modules": ["q_proj", "v_proj"]}),
    "one layer": (SOME_LAYERS, "glm", {"layers_to_transform": [2]}),
    "stabilised": (adapter_tensors(), "glm", {"use_rslora": True}),
    "stabilised, joined": (
        glm_adapter_tensors(),
        "chatglm",
        {"target_modules": GLM_TARGETS, "use_rslora": True},
    ),
    "scales that differ": (
        glm_adapter_tensors(),
        "chatglm",
        {"target_modules": GLM_TARGETS, "alpha_pattern": {"k_proj": 2, "down_proj": 9}},
    ),
    "DoRA": (with_lengths(adapter_tensors()), "glm", {"use_dora": True}),
    "DoRA, joined": (
        with_lengths(glm_adapter_tensors()),
        "chatglm",
        {"target_modules": GLM_TARGETS, "use_dora": True},
    ),
    "ranks that differ": (
        adapter_tensors(ranks={"self_attention.dense": 5}),
        "glm",
        {"rank_pattern": {"dense": 5}},
    ),
}


@pytest.mark.parametrize(("tensors", "layout", "config"), CASES.values(), ids=CASES)
def test_the_same_change_of_the_weights(hf, tmp_path, tensors, layout, config):
    old = write_adapter(tmp_path / "old", tensors, **config)
    count = convert_adapter(old, tmp_path / "new", hf, layout, force=False)
    assert len(tensors_of(tmp_path / "new")) == (3 if "use_dora" in config else 2) * count
    expected, found = merged(hf, old), merged(hf, tmp_path / "new")
    plain = read_all(hf)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **TOLERANCE)
    assert any(not torch.allclose(expected[name], plain[name].float()) for name in plain)


def test_one_matrix_becomes_three_that_share_a(hf, tmp_path):
    old = adapter_tensors()
    convert_adapter(write_adapter(tmp_path / "old", old), tmp_path / "new", hf, "glm", force=False)
    new = tensors_of(tmp_path / "new")
    was = "base_model.model.transformer.encoder.layers.1.self_attention.query_key_value.lora_"
    start = 0
    for part, rows in {"q": SMALL.query_size, "k": SMALL.kv_size, "v": SMALL.kv_size}.items():
        now = f"base_model.model.model.layers.1.self_attn.{part}_proj.lora_"
        assert torch.equal(new[f"{now}A.weight"], old[f"{was}A.weight"])
        assert torch.equal(new[f"{now}B.weight"], old[f"{was}B.weight"][start : start + rows])
        start += rows
    assert start == len(old[f"{was}B.weight"])
    assert len(new) == 2 * 6 * SMALL.num_layers


def test_three_matrices_become_one_of_their_ranks_together(hf, tmp_path):
    old = write_adapter(tmp_path / "old", glm_adapter_tensors(), target_modules=GLM_TARGETS)
    convert_adapter(old, tmp_path / "new", hf, "chatglm", force=False)
    name = "transformer.encoder.layers.0.self_attention.query_key_value"
    new = tensors_of(tmp_path / "new")
    assert len(new[f"base_model.model.{name}.lora_A.weight"]) == 3 * RANK
    config = json.loads((tmp_path / "new/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    assert config["rank_pattern"][name] == 3 * RANK
    assert config["alpha_pattern"][name] == 3 * ALPHA
    assert (config["lora_dropout"], config["task_type"]) == (0.1, "CAUSAL_LM")  # as they were
    assert config["base_model_name_or_path"] == str(hf)


def test_a_dora_of_queries_alone_has_no_form_for_the_whole(hf, tmp_path):
    tensors = {name: t for name, t in with_lengths(QUERIES_ONLY).items() if ".q_proj" in name}
    old = write_adapter(tmp_path / "old", tensors, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(CheckpointError, match=r"DoRA of a part of .*query_key_value"):
        convert_adapter(old, tmp_path / "new", hf, "chatglm", force=False)
    # Merged, it changes the queries' rows alone.
    found, plain = merged(hf, old), read_all(hf)
    name = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    same = (found[name] == plain[name].float()).all(dim=1)
    assert not same[: SMALL.query_size].any()
    assert same[SMALL.query_size :].all()


@pytest.mark.parametrize(
    ("names", "dora"),
    [
        pytest.param("chatglm", False, id="chatglm-LoRA"),
        pytest.param("chatglm", True, id="chatglm-DoRA", marks=pytest.mark.slow),
        pytest.param("glm", False, id="glm-LoRA", marks=pytest.mark.slow),
        pytest.param("glm", True, id="glm-DoRA"),
    ],
)
def test_peft_gets_the_merged_model(tmp_path, names, dora):
    """In the native layout, from an adapter of either; logits around 1, computed in fp32."""
    pytest.importorskip("peft")
    base = write_hf(tmp_path / "hf", weights={k: v / 8 for k, v in random_weights().items()})
    (base / "tokenizer.model").unlink()  # a made-up file
    convert(base, tmp_path / "glm", ConvertOptions(layout="glm"))
    tensors, config = adapter_tensors(), {}
    if names == "glm":
        tensors, config = glm_adapter_tensors(), {"target_modules": GLM_TARGETS}
    tensors = {name: tensor / 4 for name, tensor in tensors.items()}
    if dora:
        tensors, config = with_lengths(tensors), {**config, "use_dora": True}
    old = write_adapter(tmp_path / "old", tensors, **config)
    if names == "glm":  # there and back
        convert_adapter(old, tmp_path / "joined", base, "chatglm", force=False)
        old = tmp_path / "joined"
    convert_adapter(old, tmp_path / "new", base, "glm", force=False)
    convert(base, tmp_path / "merged", ConvertOptions(layout="glm", dtype="fp32", lora=old))
    folders = [tmp_path / name for name in ("glm", "new", "merged")]
    found = printed(in_peft, *folders)
    assert found["change"] > 0.01
    assert found["difference"] < 1e-5


def test_an_adapter_of_another_model_leaves_nothing(tmp_path):
    other = SMALL.model_copy(update={"hidden_size": 25})
    base = write_hf(tmp_path / "hf", model=other)
    old = write_adapter(tmp_path / "old")
    with pytest.raises(CheckpointError, match=r"lora_B of .* has the shape \[24, 3\]"):
        convert_adapter(old, tmp_path / "new", base, "glm", force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "old"]


def test_only_an_adapter_is_replaced(hf, tmp_path):
    old = write_adapter(tmp_path / "old")
    convert_adapter(old, tmp_path / "new", hf, "glm", force=False)
    with pytest.raises(ConfigError, match="new exists"):
        convert_adapter(old, tmp_path / "new", hf, "chatglm", force=False)
    convert_adapter(old, tmp_path / "new", hf, "chatglm", force=True)
    assert any("query_key_value" in name for name in tensors_of(tmp_path / "new"))
    shutil.copytree(hf, tmp_path / "model")
    with pytest.raises(ConfigError, match="something other than a model adapter"):
        convert_adapter(old, tmp_path / "model", hf, "glm", force=True)
    with pytest.raises(ConfigError, match="something other than a model, so"):
        convert(hf, tmp_path / "new", ConvertOptions(layout="mcore", force=True))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/home.txt").write_text("dear")
    with pytest.raises(ConfigError, match="something other than a model"):
        convert_adapter(old, tmp_path / "letters", hf, "glm", force=True)
