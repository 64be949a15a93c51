"""A LoRA adapter is merged as its formula says, and only where it belongs."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

from glm3cli.checkpoint.convert.convert import convert
from glm3cli.checkpoint.files.manifest import read_manifest
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.errors import CheckpointError
from tests.support.adapters import (
    ALPHA,
    RANK,
    TARGETS,
    adapter_tensors,
    glm_adapter_tensors,
    glm_targets,
    module_names,
    write_adapter,
)
from tests.support.checkpoints import SMALL, assert_same, random_weights, read_all, write_hf
from tests.support.tiny_tokenizer import tiny_tokenizer_folder

QKV = "self_attention.query_key_value"
FIRST = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value"


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("source") / "hf")


def expected(tensors, scale_of=lambda _module: ALPHA / RANK, modules=None):
    """The merged weights, entry by entry in double precision."""
    merged = {name: tensor.double().numpy() for name, tensor in random_weights().items()}
    for module in module_names() if modules is None else modules:
        a, b = (
            tensors[f"base_model.model.{module}.lora_{side}.weight"].double().numpy()
            for side in "AB"
        )
        weight = merged[f"{module}.weight"]
        for row in range(weight.shape[0]):
            for rank in range(a.shape[0]):
                weight[row] += scale_of(module) * b[row, rank] * a[rank]
    return merged


def merge(hf, tmp_path, adapter, dtype="fp32", layout="chatglm", **cuts):
    parallel = ModelParallelConfig(**cuts)
    options = ConvertOptions(layout=layout, parallel=parallel, dtype=dtype, lora=adapter)
    result = convert(hf, tmp_path / "new", options)
    return read_all(tmp_path / "new"), result


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.float32
        np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-6, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("layout", ["chatglm", "mcore", "dist"])
def test_the_formula(hf, tmp_path, kind, layout):
    tensors = adapter_tensors()
    adapter = write_adapter(tmp_path / "adapter", tensors, kind)
    found, result = merge(hf, tmp_path, adapter, layout=layout)
    assert_close(found, expected(tensors))
    assert result.merged == 4 * SMALL.num_layers
    assert result.verified
    assert read_manifest(tmp_path / "new").settings["lora"] == str(adapter)


def test_the_sum_is_rounded_once(hf, tmp_path):
    tensors = adapter_tensors()
    found, _ = merge(hf, tmp_path, write_adapter(tmp_path / "adapter", tensors), dtype="keep")
    for name, tensor in random_weights().items():
        pair = [f"base_model.model.{name[:-7]}.lora_{side}.weight" for side in "BA"]
        if pair[0] in tensors:
            product = tensors[pair[0]] @ tensors[pair[1]]
            tensor = (tensor.float() + product * (ALPHA / RANK)).half()
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("cuts", [{"tp": 2, "pp": 2}, {"tp": 4}, {"pp": 2, "vpp": 2}], ids=str)
def test_every_source_and_stage(hf, tmp_path, cuts):
    convert(
        hf, tmp_path / "mg", ConvertOptions(layout="mcore", parallel=ModelParallelConfig(**cuts))
    )
    tensors = adapter_tensors()
    found, _ = merge(tmp_path / "mg", tmp_path, write_adapter(tmp_path / "adapter", tensors))
    assert_close(found, expected(tensors))


@pytest.mark.parametrize("target", TARGETS)
def test_one_target_module(hf, tmp_path, target):
    tensors = adapter_tensors(target)
    targets = [target.split(".")[1]]
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=targets)
    found, _ = merge(hf, tmp_path, adapter)
    assert_close(found, expected(tensors, modules=module_names(target)))


def test_rank_stabilised_scale(hf, tmp_path):
    tensors = adapter_tensors()
    adapter = write_adapter(tmp_path / "adapter", tensors, use_rslora=True)
    found, _ = merge(hf, tmp_path, adapter)
    assert_close(found, expected(tensors, lambda _module: ALPHA / math.sqrt(RANK)))


def test_ranks_and_alphas_of_single_modules(hf, tmp_path):
    tensors = adapter_tensors(ranks={"self_attention.dense": 5})
    adapter = write_adapter(
        tmp_path / "adapter",
        tensors,
        rank_pattern={"dense": 5},
        alpha_pattern={r"layers\.[01]\.mlp\.dense_h_to_4h": 2},
    )
    found, _ = merge(hf, tmp_path, adapter)

    def scale(module):
        if module.endswith(("0.mlp.dense_h_to_4h", "1.mlp.dense_h_to_4h")):
            return 2 / RANK
        return ALPHA / (5 if module.endswith("attention.dense") else RANK)

    assert_close(found, expected(tensors, scale))


def test_some_layers_only(hf, tmp_path):
    tensors = {n: t for n, t in adapter_tensors(QKV).items() if ".layers.2." in n}
    adapter = write_adapter(
        tmp_path / "adapter", tensors, target_modules=["query_key_value"], layers_to_transform=[2]
    )
    found, _ = merge(hf, tmp_path, adapter)
    modules = [f"transformer.encoder.layers.2.{QKV}"]
    assert_close(found, expected(tensors, modules=modules))


def test_names_with_the_adapter_in_them(hf, tmp_path):
    tensors = adapter_tensors()
    renamed = {n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}
    found, _ = merge(hf, tmp_path, write_adapter(tmp_path / "adapter", renamed, "bin"))
    assert_close(found, expected(tensors))


@pytest.mark.parametrize(
    ("front", "inner"),
    [
        ("_orig_mod.base_model.model.", ""),
        ("module.base_model.model._fsdp_wrapped_module.", "_checkpoint_wrapped_module."),
        ("base_model.model.module.", "_orig_mod._fsdp_wrapped_module."),
    ],
)
def test_names_of_a_wrapped_model(hf, tmp_path, caplog, front, inner):
    tensors = adapter_tensors()
    wrapped = {
        re.sub("(self_attention|mlp)", rf"{inner}\1", name.replace("base_model.model.", front)): one
        for name, one in tensors.items()
    }
    found, _ = merge(hf, tmp_path, write_adapter(tmp_path / "adapter", wrapped))
    assert_close(found, expected(tensors))
    taken = {*(front + inner).replace("base_model.model.", "").split(".")} - {""}
    said = " and ".join(f"{one}." for one in sorted(taken))
    assert f"adapter_model.safetensors have {said}, which is left out" in caplog.text


@pytest.mark.parametrize("layout", ["glm", "chatglm", "mcore"])
def test_an_adapter_of_the_native_model(hf, tmp_path, layout):
    tensors = glm_adapter_tensors()
    short = [target.split(".")[1] for target in glm_targets()]
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=short)
    source = tmp_path / "hf"
    shutil.copytree(hf, source)
    shutil.copy(tiny_tokenizer_folder() / "tokenizer.model", source)
    found, result = merge(source, tmp_path, adapter, layout=layout)
    merged = {name: tensor.float() for name, tensor in random_weights().items()}
    parts = {  # where its modules' rows lie in our weights
        "self_attn.q_proj": ("self_attention.query_key_value", 0),
        "self_attn.k_proj": ("self_attention.query_key_value", SMALL.query_size),
        "self_attn.v_proj": ("self_attention.query_key_value", SMALL.query_size + SMALL.kv_size),
        "self_attn.o_proj": ("self_attention.dense", 0),
        "mlp.gate_up_proj": ("mlp.dense_h_to_4h", 0),
        "mlp.down_proj": ("mlp.dense_4h_to_h", 0),
    }
    for name, tensor in tensors.items():
        layer, target = re.fullmatch(r".*layers\.(\d+)\.(.+)\.lora_B\.weight|.*", name).groups()
        if layer is not None:
            ours, start = parts[target]
            weight = merged[f"transformer.encoder.layers.{layer}.{ours}.weight"]
            product = tensor @ tensors[name.replace("lora_B", "lora_A")]
            weight[start : start + len(tensor)] += product * (ALPHA / RANK)
    assert_close(found, {name: tensor.numpy() for name, tensor in merged.items()})
    assert result.merged == 4 * SMALL.num_layers


def test_one_projection_of_the_native_model(hf, tmp_path):
    tensors = {n: t for n, t in glm_adapter_tensors().items() if ".v_proj." in n}
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=["v_proj"])
    found, _ = merge(hf, tmp_path, adapter)
    rows = SMALL.query_size + SMALL.kv_size
    for name, tensor in random_weights().items():
        changed = found[name] != tensor.float()
        if name.endswith("query_key_value.weight"):
            assert changed[rows:].any(dim=1).all()
            changed = changed[:rows]
        assert not changed.any(), name


def test_names_of_both_models(hf, tmp_path):
    tensors = adapter_tensors() | glm_adapter_tensors()
    refused(hf, tmp_path, write_adapter(tmp_path / "adapter", tensors), "is no lora_A or lora_B of")


def test_without_an_adapter_nothing_changes(hf, tmp_path):
    found, result = merge(hf, tmp_path, None, dtype="keep")
    assert_same(found, random_weights())
    assert result.merged == 0


def refused(hf, tmp_path, adapter, sentence):
    with pytest.raises(CheckpointError, match=sentence) as caught:
        merge(hf, tmp_path, adapter)
    assert caught.value.hint
    assert not (tmp_path / "new").exists()


WRONG = [
    (lambda t: t.pop(f"{FIRST}.lora_A.weight"), "lacks lora_A of .*0.self_attention.query_key"),
    (lambda t: t.pop(f"{FIRST}.lora_B.weight"), "lacks lora_B of .*0.self_attention.query_key"),
    (
        lambda t: [t.pop(f"{FIRST}.lora_{side}.weight") for side in "AB"],
        "lacks lora_A and lora_B of transformer.encoder.layers.0.self_attention.query_key_value",
    ),
    (
        lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(RANK, 25)}),
        r"lora_A of .* has the shape \[3, 25\]; with rank 3 this base model needs \[3, 24\]",
    ),
    (
        lambda t: t.update({f"{FIRST}.lora_B.weight": torch.ones(48, RANK + 1)}),
        r"lora_B of .* has the shape \[48, 4\]; .* needs \[48, 3\]",
    ),
    (
        lambda t: t.update({f"{FIRST}.lora_B.weight": torch.ones(48, RANK).char()}),
        "lora_B of .* is torch.int8",
    ),
    (
        lambda t: t.update({FIRST.replace("s.0.", "s.4.") + ".lora_A.weight": torch.ones(1)}),
        "is for layer 4, but the model has 4 layers",
    ),
    (
        lambda t: t.update({f"{FIRST}.lora_A.bias": torch.ones(1)}),
        "lora_A.bias is no lora_A or lora_B of query_key_value, dense, dense_h_to_4h or",
    ),
    (
        lambda t: t.update({FIRST.replace("query_key_value", "q_proj") + ".lora_A.weight": None}),
        "q_proj.lora_A.weight is no lora_A or lora_B of query_key_value",
    ),
    (
        lambda t: t.update(
            {"base_model.model.transformer.embedding.word_embeddings.lora_embedding_A": None}
        ),
        r"changes the output layer or the embedding, which .*word_embeddings.lora_embedding_A\)",
    ),
    (
        lambda t: t.update({"base_model.model.transformer.output_layer.weight": None}),
        r"has a whole output layer or embedding beside .*save_embedding.*output_layer.weight\)",
    ),
    (
        # as PEFT saves an adapter of it
        lambda t: t.update(
            {
                "base_model.model.lm_head.base_layer.weight": None,
                "base_model.model.lm_head.lora_A.weight": None,
                "base_model.model.lm_head.lora_B.weight": None,
            }
        ),
        r"changes the output layer or the embedding, which glm3 doesn't merge .*lm_head.lora_A",
    ),
    (
        lambda t: t.update({f"{FIRST}.lora_magnitude_vector": torch.ones(48)}),
        r"lora_magnitude_vector of .*query_key_value, but .* says that it is no DoRA \(use_dora\)",
    ),
    (lambda t: t.clear(), "lacks lora_A and lora_B of"),
]


@pytest.mark.parametrize(
    ("change", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG]
)
def test_tensors_that_do_not_fit(hf, tmp_path, change, sentence):
    tensors = adapter_tensors()
    change(tensors)
    tensors = {n: torch.ones(2, 2) if t is None else t for n, t in tensors.items()}
    refused(hf, tmp_path, write_adapter(tmp_path / "adapter", tensors), sentence)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"peft_type": "IA3"}, "is of an adapter of the kind IA3; glm3 knows LoRA, rsLoRA"),
        ({"peft_type": "LOHA", "alpha": 8}, "is of an adapter of the kind LOHA"),
        ({"peft_type": "PREFIX_TUNING", "r": None}, "is of an adapter of the kind PREFIX_TUNING"),
        ({"alora_invocation_tokens": [5]}, r"is of an activated LoRA \(aLoRA\)"),
        ({"init_lora_weights": "lora_ga"}, "whose start, lora_ga, changed the weights of the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "whose start, pissa_niter_4, changed"),
        ({"modules_to_save": ["lm_head"]}, r"with whole modules beside it \(modules_to_save\)"),
        ({"bias": "all"}, r"is of a LoRA with biases \(bias all\)"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_dora": True}, "lacks lora_magnitude_vector of .*query_key_value"),
        ({"r": 0}, "r: Input should be greater than 0"),
        ({"r": None}, "r: Field required"),
        ({"rank_pattern": {"(": 3}}, "is no regular expression"),
        ({"r": 4}, r"has the shape \[3, \d+\]; with rank 4 this base model needs \[4, "),
    ],
    ids=str,
)
def test_configs_that_do_not_fit(hf, tmp_path, config, sentence):
    refused(hf, tmp_path, write_adapter(tmp_path / "adapter", **config), sentence)


def test_broken_folders(hf, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refused(hf, tmp_path, adapter, "adapter_model.safetensors is damaged")
    path.unlink()
    refused(hf, tmp_path, adapter, "has neither adapter_model.safetensors nor adapter_model.bin")
    torch.save([1], adapter / "adapter_model.bin")
    refused(hf, tmp_path, adapter, "holds no named tensors")
    torch.save({"x": 1}, adapter / "adapter_model.bin")
    refused(hf, tmp_path, adapter, "x is no tensor")
    (adapter / "adapter_config.json").write_text("{")
    refused(hf, tmp_path, adapter, "is no valid JSON")
    (adapter / "adapter_config.json").unlink()
    refused(hf, tmp_path, adapter, "has no adapter_config.json")


def test_an_adapter_of_another_base_model(hf, tmp_path):
    wider = SMALL.model_copy(update={"hidden_size": 32})
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors(model=wider))
    refused(hf, tmp_path, adapter, "this base model needs")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == RANK
