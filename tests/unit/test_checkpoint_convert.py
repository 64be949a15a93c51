"""Every layout at every cut comes back bit by bit."""

import dataclasses
import io
import json
import zipfile

import pytest
import torch
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader

from glm3cli.checkpoint.adapter.pairs import Adapter
from glm3cli.checkpoint.convert.convert import convert
from glm3cli.checkpoint.convert.verify import logits_difference
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.errors import CheckpointError, ConfigError
from tests.support.checkpoints import SMALL, assert_same, random_weights, read_all, write_hf

CUTS = [
    {},
    {"tp": 2},
    {"pp": 2},
    {"tp": 2, "pp": 2},
    {"pp": 2, "vpp": 2},
    {"tp": 2, "pp": 2, "vpp": 2},
    {"pp": 3, "layers_per_stage": "2,1,1"},
    {"tp": 2, "pp": 2, "layers_per_stage": "1,3"},
]


def options(layout="mcore", **values):
    cuts = {k: values.pop(k) for k in list(values) if k in ModelParallelConfig.model_fields}
    return ConvertOptions(layout=layout, parallel=ModelParallelConfig(**cuts), **values)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("source") / "hf", shards=3)


@pytest.mark.parametrize("layout", ["mcore", "legacy"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_per_rank_round_trip(hf, tmp_path, layout, cuts):
    convert(hf, tmp_path / "mg", options(layout, **cuts))
    source = open_source(tmp_path / "mg")
    assert source.layout == layout
    assert source.iteration == 1
    assert source.parallel == ModelParallelConfig(**cuts)
    convert(tmp_path / "mg", tmp_path / "back", options("chatglm"))
    assert_same(read_all(tmp_path / "back"), random_weights())


@pytest.mark.parametrize("tp", [4, 8])
def test_more_ranks_than_query_groups(hf, tmp_path, tp):
    convert(hf, tmp_path / "mg", options("mcore", tp=tp))
    assert_same(read_all(tmp_path / "mg"), random_weights())
    with pytest.raises(ConfigError, match=f"not divisible by --tp {tp}, which --format legacy"):
        convert(hf, tmp_path / "legacy", options("legacy", tp=tp))


def test_dist_round_trip_and_recut(hf, tmp_path):
    convert(hf, tmp_path / "dist", options("dist"))
    assert open_source(tmp_path / "dist").layout == "dist"
    convert(tmp_path / "dist", tmp_path / "mg", options("legacy", tp=2, pp=2))
    convert(tmp_path / "mg", tmp_path / "mg2", options("mcore", pp=4))
    convert(tmp_path / "mg2", tmp_path / "dist2", options("dist"))
    convert(tmp_path / "dist2", tmp_path / "back", options("chatglm"))
    assert_same(read_all(tmp_path / "back"), random_weights())


@pytest.mark.parametrize(
    ("name", "traits", "back"),
    [
        ("chatglm2-6b-32k", {"rope_factor": 16.0}, "chatglm"),
        ("GLM-4-9B-0414", {"sandwich_norms": True}, "glm"),
        ("GLM-4-32B-0414", {"sandwich_norms": True, "add_qkv_bias": False}, "glm"),
    ],
)
def test_members_of_other_traits_come_back_from_every_layout(tmp_path, name, traits, back):
    model = SMALL.model_copy(update=traits)
    weights = random_weights(model)
    source = write_hf(tmp_path / "hf", model=model, weights=weights)
    (source / "tokenizer.model").unlink()
    content = {"_name_or_path": f"THUDM/{name}"} | model.to_config()
    (source / "config.json").write_text(json.dumps(content))
    chain = [options("glm"), options("dist"), options("mcore", tp=4), options("mcore", tp=2, pp=2)]
    chain += [options("legacy", tp=2), options(back)]
    for number, step in enumerate(chain):
        convert(source, tmp_path / str(number), step)
        source = tmp_path / str(number)
        assert open_source(source).model == model
        assert_same(read_all(source), weights)
        assert json.loads((source / "config.json").read_text())["_name_or_path"] == f"THUDM/{name}"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_hugging_face_files_of_either_kind(tmp_path, kind, shards):
    source = write_hf(tmp_path / "hf", kind=kind, shards=shards)
    convert(source, tmp_path / "mg", options("mcore", tp=2))
    assert_same(read_all(tmp_path / "mg"), random_weights())


def test_bin_of_the_format_before_torch_1_6(tmp_path):
    source = write_hf(tmp_path / "hf", kind="bin")
    weights = random_weights()
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(read_all(source), weights)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["chatglm", "mcore", "dist"])
def test_cast(tmp_path, dtype, layout):
    weights = random_weights(dtype=torch.float32)
    source = write_hf(tmp_path / "hf", weights=weights)
    convert(source, tmp_path / "new", options(layout, dtype=dtype))
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert_same(read_all(tmp_path / "new"), {n: t.to(kind) for n, t in weights.items()})
    assert open_source(tmp_path / "new").model.torch_dtype == dtype


def test_mixed_types_are_kept(tmp_path):
    weights = random_weights()
    weights = {n: t.float() if "norm" in n else t for n, t in weights.items()}
    source = write_hf(tmp_path / "hf", weights=weights)
    convert(source, tmp_path / "mg", options("mcore", tp=2))
    convert(tmp_path / "mg", tmp_path / "back", options("chatglm"))
    assert_same(read_all(tmp_path / "back"), weights)


def test_a_shape_that_the_heads_do_not_tell(tmp_path):
    model = SMALL.model_copy(update={"num_query_groups": 1, "rope_ratio": 50.0})
    source = write_hf(tmp_path / "hf", model=model)
    convert(source, tmp_path / "mg", options("mcore", tp=2))
    assert open_source(tmp_path / "mg").model == model
    assert_same(read_all(tmp_path / "mg"), random_weights(model))


def test_shape_from_the_saved_arguments(hf, tmp_path, caplog):
    convert(hf, tmp_path / "mg", options("legacy", tp=2))
    (tmp_path / "mg/config.json").unlink()
    assert open_source(tmp_path / "mg").model == SMALL
    convert(tmp_path / "mg", tmp_path / "back", options("chatglm"))
    assert "rope_ratio 1.0 is assumed" in caplog.text
    assert_same(read_all(tmp_path / "back"), random_weights())


def test_shards_of_the_given_size(hf, tmp_path):
    convert(hf, tmp_path / "new", options("chatglm", shard_bytes=9_000))
    index = json.loads((tmp_path / "new/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert all(file.stat().st_size < 11_000 for file in files)
    assert index["metadata"]["total_size"] == 2 * SMALL.num_parameters
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert_same(read_all(tmp_path / "new"), random_weights())


def test_companions_are_copied_byte_by_byte(hf, tmp_path):
    code = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    config = {"_name_or_path": "THUDM/chatglm3-6b", **SMALL.to_hf(), "auto_map": code}
    (hf / "config.json").write_text(json.dumps(config, indent=7))
    convert(hf, tmp_path / "mg", options("mcore"))
    convert(tmp_path / "mg/iter_0000001", tmp_path / "back", options("chatglm"))
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    assert (tmp_path / "back/tokenization_chatglm.py").is_file()
    convert(hf, tmp_path / "cast", options("mcore", dtype="bf16"))
    config = json.loads((tmp_path / "cast/config.json").read_text())
    assert (config["torch_dtype"], config["auto_map"]) == ("bfloat16", code)


def test_result(hf, tmp_path):
    result = convert(hf, tmp_path / "mg", options("mcore"))
    assert result.tensors == 31
    assert result.verified
    assert result.bytes > 2 * SMALL.num_parameters
    assert result.peak_private_bytes > 0
    assert result.non_finite == 0
    assert not convert(hf, tmp_path / "mg2", options("mcore", verify=False)).verified


def test_a_small_models_logits_are_compared(hf, tmp_path, monkeypatch):
    def difference(target, **options):
        return convert(hf, tmp_path / target, ConvertOptions(**options)).logits_difference

    assert difference("same", layout="mcore", parallel=ModelParallelConfig(tp=2, pp=2)) == 0
    # Weights that are rounded to 8 bits change logits, whose size is about 10, by some percent.
    assert 1e-3 < difference("rounded", layout="dist", dtype="bf16") < 1
    assert difference("unread", layout="mcore", verify=False) is None
    monkeypatch.setattr("glm3cli.checkpoint.convert.verify._MOST_PARAMETERS", 10_000)
    assert difference("large", layout="mcore") is None


def test_other_logits_are_refused(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "glm3cli.checkpoint.convert.verify.logits_difference", lambda *_sources: 0.25
    )
    with pytest.raises(CheckpointError, match=r"other logits than the source \(by 2.50e-01\)"):
        convert(hf, tmp_path / "new", ConvertOptions(layout="mcore"))
    assert not list(tmp_path.iterdir())


def test_logits_tell_models_apart(hf, tmp_path):
    weights = random_weights()
    name = "transformer.encoder.layers.2.self_attention.query_key_value.bias"
    weights[name] = weights[name].roll(1)
    other = open_source(write_hf(tmp_path / "other", weights=weights))
    assert logits_difference(open_source(hf), Adapter({}), other) > 1e-3
    assert logits_difference(other, Adapter({}), other) == 0


@pytest.mark.parametrize("wide", ["embedding.word_embeddings", "output_layer"])
@pytest.mark.parametrize("layout", ["chatglm", "mcore", "dist"])
def test_a_weight_may_be_larger_than_all_others_together(tmp_path, layout, wide):
    model = SMALL.model_copy(update={"padded_vocab_size": 1024, "num_layers": 1})
    weights = random_weights(model)
    name = f"transformer.{wide}.weight"
    weights[name] = weights[name].float()
    source = write_hf(tmp_path / "hf", model=model, weights=weights)
    convert(source, tmp_path / "new", options(layout))
    assert_same(read_all(tmp_path / "new"), weights)


def test_values_that_are_not_finite_are_counted(tmp_path, caplog):
    weights = random_weights(dtype=torch.float32)
    weights["transformer.output_layer.weight"][0, :3] = torch.tensor([1e30, float("nan"), 1.0])
    weights["transformer.embedding.word_embeddings.weight"][1, 1] = float("inf")
    source = write_hf(tmp_path / "hf", weights=weights)
    result = convert(source, tmp_path / "new", options("mcore", dtype="fp16"))
    assert result.non_finite == 3
    assert "2 values of output are NaN or infinite" in caplog.text
    assert "1 values of embedding are NaN or infinite" in caplog.text


def test_rank_files_have_valid_checksums_and_the_megatron_keys(hf, tmp_path):
    convert(hf, tmp_path / "mg", options("legacy", tp=2, pp=2))
    assert (tmp_path / "mg/latest_checkpointed_iteration.txt").read_text() == "1"
    files = sorted((tmp_path / "mg").glob("iter_0000001/mp_rank_*/model_optim_rng.pt"))
    assert [file.parent.name for file in files] == [
        "mp_rank_00_000",
        "mp_rank_00_001",
        "mp_rank_01_000",
        "mp_rank_01_001",
    ]
    for file in files:
        assert zipfile.ZipFile(file).testzip() is None
        saved = torch.load(file, weights_only=False)
        assert saved["checkpoint_version"] == 3.0
        assert saved["args"].tensor_model_parallel_size == 2
        assert saved["args"].params_dtype is torch.float16


@pytest.mark.parametrize("dtype", ["keep", "bf16", "fp32"])
def test_every_part_of_a_dist_file_is_what_torch_would_save(hf, tmp_path, dtype):
    convert(hf, tmp_path / "mg", options("dist", dtype=dtype))
    metadata = FileSystemReader(tmp_path / "mg").read_metadata()
    for index, place in metadata.storage_data.items():
        content = (tmp_path / "mg" / place.relative_path).read_bytes()
        part = io.BytesIO(content[place.offset : place.offset + place.length])
        assert zipfile.ZipFile(part).testzip() is None
        part.seek(0)
        value = torch.load(part)
        saved = io.BytesIO()
        torch.save(value, saved)
        assert place.length == len(saved.getvalue())
        if isinstance(value, torch.Tensor):
            assert place.offset % 64 == 0
            stored = metadata.state_dict_metadata[index.fqn]
            assert value.shape == next(
                chunk.sizes for chunk in stored.chunks if chunk.offsets == index.offset
            )
            assert value.dtype == stored.properties.dtype
        else:
            assert value == [None]


def test_a_transformer_engine_model_is_read(hf, tmp_path):
    convert(hf, tmp_path / "mg", options("mcore"))
    file = tmp_path / "mg/iter_0000001/mp_rank_00/model_optim_rng.pt"
    saved = torch.load(file, weights_only=False)
    renames = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    for old, new in renames.items():
        for i in range(SMALL.num_layers):
            saved["model"][f"decoder.layers.{i}.{new}"] = saved["model"].pop(
                f"decoder.layers.{i}.{old}"
            )
    torch.save(saved, file)
    assert_same(read_all(tmp_path / "mg"), random_weights())


def test_a_training_run_is_read_at_its_newest_complete_checkpoint(hf, tmp_path):
    run = tmp_path / "run"
    convert(hf, run / "iter_0000010", options("dist"))
    convert(hf, run / "iter_0000020", options("dist", dtype="fp32"))
    convert(hf, run / "iter_0000030", options("dist"))
    (run / "iter_0000030/metadata.json").unlink()
    source = open_source(run)
    assert (source.path.name, source.iteration) == ("iter_0000020", 20)
    with pytest.raises(CheckpointError, match="incomplete checkpoint"):
        open_source(run / "iter_0000030")


@pytest.mark.parametrize("name", ["mg2hg", "mg2hf"])
def test_the_folder_of_an_older_conversion_is_found(hf, tmp_path, name):
    convert(hf, tmp_path / "model" / name, options("chatglm"))
    (tmp_path / "model" / name / "config.json").rename(tmp_path / "model/config.json")
    assert open_source(tmp_path / "model").path.name == name


def test_options_are_values():
    changed = dataclasses.replace(options("mcore", tp=2), force=True)
    assert changed.parallel.tp == 2
