"""Checkpoints of other trainers, and Hugging Face folders that somebody has saved anew."""

import contextlib
import enum
import json
import sys
import types
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glm3cli.checkpoint.convert.convert import convert
from glm3cli.checkpoint.convert.inspect import inspect
from glm3cli.checkpoint.layouts.companions import copy_companions
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.errors import CheckpointError
from tests.support.checkpoints import SMALL, assert_same, random_weights, read_all
from tests.support.checkpoints import write_hf as write_whole
from tests.support.project import call

GLM4 = SMALL.model_copy(update={"rope_ratio": 500.0, "torch_dtype": "bf16"})
GLM4_0414 = SMALL.model_copy(
    update={"sandwich_norms": True, "add_qkv_bias": False, "torch_dtype": "bf16"}
)
TE = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def write_hf(folder: Path, **options) -> Path:
    """A Hugging Face folder without a tokenizer."""
    write_whole(folder, **options)
    (folder / "tokenizer.model").unlink()
    return folder


@contextlib.contextmanager
def foreign_enums(*names: str):
    """Gives enums of programs that aren't installed, which vanish after a file is written."""
    modules, made = {}, []
    for name in names:
        place, _, kind = name.rpartition(".")
        module = modules.setdefault(place, types.ModuleType(place))
        made.append(enum.Enum(kind, {"FIRST": "disabled"}, module=place))
        setattr(module, kind, made[-1])
    for name in list(modules):
        for parent in (name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)):
            modules.setdefault(parent, sys.modules.get(parent) or types.ModuleType(parent))
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield made
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def as_mindspeed_saves(folder: Path, model: ModelConfig, *, renames: dict[str, str]) -> None:
    """Makes per-rank files those of a training by MindSpeed-LLM, with a distributed optimizer."""
    (folder / "config.json").unlink()
    for file in folder.rglob("model_optim_rng.pt"):
        saved = torch.load(file, weights_only=False)
        weights: dict[str, Tensor] = saved["model"]
        for name in list(weights):
            for old, new in renames.items():
                if name.endswith(old):
                    weights[name.removesuffix(old) + new] = weights.pop(name)
        weights["decoder.final_layernorm._extra_state"] = torch.ByteTensor([1])
        given = vars(saved["args"])
        for ours in ("rope_ratio", "rope_factor", "sandwich_norms"):
            given.pop(ours, None)
        kinds = (
            "megatron.core.enums.ModelType",
            "megatron.core.rerun_state_machine.RerunMode",
            "mindspeed_llm.training.arguments.Stage",
        )
        with foreign_enums(*kinds) as (model_type, mode, stage):
            given |= {
                "model_type": model_type.FIRST,
                "stage": stage.FIRST,
                "rotary_base": int(model.rotary_base),
                "rotary_percent": 0.5,
                "use_glm_rope": True,
                "post_norm": model.sandwich_norms,
            }
            content = {
                "args": Namespace(**given),
                "checkpoint_version": 3.0,
                "iteration": 7,
                "num_floating_point_operations_so_far": 9.0,
                "model": weights,
                "optimizer": {"optimizer": {"param_groups": [{"lr": 1e-6, "step": 7}]}},
                "opt_param_scheduler": {"max_lr": 1e-6, "num_steps": 14},
                "rng_state": [{"torch_rng_state": torch.get_rng_state()}],
                "rerun_state_machine": {"mode": mode.FIRST},
            }
            torch.save(content, file)
        torch.save({0: torch.zeros(3)}, file.with_name("distrib_optim.pt"))


SAVED = {
    "ChatGLM3, local names": (SMALL, {}),
    "ChatGLM3, Transformer Engine's": (SMALL, TE),
    "GLM-4-9B": (GLM4, {}),
    "GLM-4-0414": (GLM4_0414, {"post_self_attn_layernorm.weight": "post_attn_norm.weight"}),
}


@pytest.mark.parametrize(("model", "renames"), SAVED.values(), ids=SAVED)
def test_mindspeed_llms_checkpoints_are_read_and_converted(tmp_path, model, renames):
    weights = random_weights(model, torch.bfloat16)
    hf = write_hf(tmp_path / "hf", model=model, weights=weights)
    cuts = ModelParallelConfig(tp=2, pp=2)
    convert(hf, tmp_path / "mg", ConvertOptions("mcore", cuts, dtype="bf16", verify=False))
    as_mindspeed_saves(tmp_path / "mg", model, renames=renames)
    source = open_source(tmp_path / "mg")
    assert source.model == model.model_copy(update={"torch_dtype": "bf16"})
    expected = random_weights(model, torch.bfloat16)
    assert_same(read_all(tmp_path / "mg"), expected)
    convert(tmp_path / "mg", tmp_path / "back", ConvertOptions("chatglm" if not renames else "glm"))
    assert_same(read_all(tmp_path / "back"), expected)
    assert inspect(tmp_path / "mg").unused == [
        "distrib_optim.pt", "num_floating_point_operations_so_far", "opt_param_scheduler",
        "optimizer", "rerun_state_machine", "rng_state",
    ]  # fmt: skip
    shown = call("convert", "inspect", str(tmp_path / "mg"))
    assert "without use for glm3: distrib_optim.pt" in " ".join(shown.out.split())


def test_another_rotation_in_the_arguments_is_warned_of(tmp_path, caplog):
    hf = write_hf(tmp_path / "hf")
    convert(hf, tmp_path / "mg", ConvertOptions("mcore", verify=False))
    as_mindspeed_saves(tmp_path / "mg", SMALL, renames={})
    file = next((tmp_path / "mg").rglob("model_optim_rng.pt"))
    with foreign_enums(
        "megatron.core.enums.ModelType",
        "megatron.core.rerun_state_machine.RerunMode",
        "mindspeed_llm.training.arguments.Stage",
    ):
        saved = torch.load(file, weights_only=False)
        saved["args"].rotary_percent = 0.51
        torch.save(saved, file)
    open_source(tmp_path / "mg")
    assert "was trained with rotary_percent 0.51" in caplog.text


def test_a_vocabulary_that_was_padded_is_read_without_the_padding(tmp_path, caplog):
    weights = random_weights()
    wide = {
        name: torch.cat([one, torch.full((8, one.shape[1]), 7.0).half()])
        if "word_embeddings" in name or "output_layer" in name
        else one
        for name, one in weights.items()
    }
    padded = SMALL.model_copy(update={"padded_vocab_size": SMALL.padded_vocab_size + 8})
    hf = write_hf(tmp_path / "hf", model=padded, weights=wide)
    for layout in ("mcore", "legacy", "glm"):
        cuts = ModelParallelConfig(tp=1 if layout == "glm" else 2)
        convert(hf, tmp_path / layout, ConvertOptions(layout, cuts, verify=False))
        config = SMALL.to_glm() if layout == "glm" else SMALL.to_hf()
        (tmp_path / layout / "config.json").write_text(json.dumps(config))
        assert_same(read_all(tmp_path / layout), weights)
    assert (
        "has embeddings of 64 tokens, of which the 56 of the model's vocabulary are read"
        in caplog.text
    )
    convert(tmp_path / "mcore", tmp_path / "new", ConvertOptions("chatglm"))
    assert_same(read_all(tmp_path / "new"), weights)


def test_names_without_the_prefix_of_the_outer_class(tmp_path):
    weights = random_weights()
    bare = {name.removeprefix("transformer."): one for name, one in weights.items()}
    assert_same(read_all(write_hf(tmp_path / "hf", weights=bare, shards=2)), weights)


def test_norms_in_fp32_beside_weights_in_16_bits(tmp_path):
    weights = random_weights()
    mixed = {name: one.float() if "norm" in name else one for name, one in weights.items()}
    hf = write_hf(tmp_path / "hf", weights=mixed)
    convert(hf, tmp_path / "mg", ConvertOptions("mcore", ModelParallelConfig(tp=2, pp=2)))
    convert(tmp_path / "mg", tmp_path / "back", ConvertOptions("chatglm"))
    assert_same(read_all(tmp_path / "back"), mixed)
    convert(hf, tmp_path / "fp16", ConvertOptions("glm", dtype="fp16"))
    assert_same(read_all(tmp_path / "fp16"), weights)


KINDS = {
    "P-Tuning v2": ("transformer.prefix_encoder.embedding.weight", "prefix encoder of P-Tuning v2"),
    "int8": ("transformer.encoder.layers.0.mlp.dense_4h_to_h.weight_scale", "are quantised"),
    "GPTQ": ("transformer.encoder.layers.0.mlp.dense_4h_to_h.qweight", "are quantised"),
    "bitsandbytes": ("transformer.encoder.layers.0.mlp.dense_4h_to_h.SCB", "are quantised"),
    "fp8": ("transformer.encoder.layers.0.mlp.dense_4h_to_h.weight_scale_inv", "are quantised"),
    "an adapter inside": (
        "transformer.encoder.layers.0.self_attention.query_key_value.lora_A.default.weight",
        "has an adapter beside the weights",
    ),
    "a reward model": ("score.weight", "a head that scores or classifies"),
    "images": ("transformer.vision.patch_embedding.proj.weight", "sees images"),
}


@pytest.mark.parametrize(("name", "reason"), KINDS.values(), ids=KINDS)
def test_what_tensors_show_of_another_kind_of_checkpoint_is_said(tmp_path, name, reason):
    weights = random_weights() | {name: torch.ones(3).half()}
    hf = write_hf(tmp_path / "hf", weights=weights)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_source(hf)
    assert name in caught.value.message
    assert caught.value.hint


def test_a_config_with_the_names_of_transformers_alone(tmp_path):
    raw = SMALL.to_hf()
    theirs = {
        "num_layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size",
        "kv_channels": "head_dim", "padded_vocab_size": "vocab_size", "torch_dtype": "dtype",
        "seq_length": "max_position_embeddings", "multi_query_group_num": "num_key_value_heads",
        "layernorm_epsilon": "rms_norm_eps",
    }  # fmt: skip
    renamed = {theirs.get(name, name): value for name, value in raw.items()}
    del renamed["multi_query_attention"]
    (tmp_path / "config.json").write_text(json.dumps(renamed))
    assert ModelConfig.from_file(tmp_path) == SMALL


def test_both_names_of_a_size_say_the_same(tmp_path: Path) -> None:
    shape = SMALL.to_hf() | {"num_layers": 40, "num_hidden_layers": 40}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    (tmp_path / "new").mkdir()
    copy_companions(tmp_path, tmp_path / "new", SMALL)
    written = json.loads((tmp_path / "new/config.json").read_text())
    assert written["num_hidden_layers"] == written["num_layers"] == SMALL.num_layers
