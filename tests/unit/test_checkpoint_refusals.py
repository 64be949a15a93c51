"""What is wrong with a checkpoint is said in a sentence, and nothing is left behind."""

import enum
import json
import pickle
import random
import re
import shutil

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from safetensors.torch import load_file, save_file

from glm3cli.checkpoint.convert import transfer
from glm3cli.checkpoint.convert.convert import convert
from glm3cli.checkpoint.files.manifest import MANIFEST
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.errors import CheckpointError, ConfigError
from tests.support.checkpoints import assert_same, random_weights, read_all, write_hf

NORM = "transformer.encoder.final_layernorm.weight"


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf", shards=2)


def ranks(tmp_path, **cuts):
    hf = write_hf(tmp_path / "for_ranks")
    options = ConvertOptions(layout="mcore", parallel=ModelParallelConfig(**cuts), verify=False)
    convert(hf, tmp_path / "mg", options)
    shutil.rmtree(hf)
    return tmp_path / "mg"


def refused(source, sentence, error=CheckpointError, target=None, **options):
    target = target or source.parent / "new"
    before = set(source.parent.rglob("*"))
    with pytest.raises(error, match=sentence) as caught:
        convert(source, target, ConvertOptions(layout="mcore", **options))
    assert caught.value.hint
    assert set(source.parent.rglob("*")) == before


def change(folder, function):
    """Applies `function` to the tensors of the second shard."""
    path = folder / "model-00002-of-00002.safetensors"
    weights = load_file(path)
    function(weights)
    save_file(weights, path)


def rewrite(path, function):
    """Applies `function` to the content of a rank file."""
    saved = torch.load(path, weights_only=False)
    function(saved)
    torch.save(saved, path)


def test_no_such_folder(tmp_path):
    refused(tmp_path / "absent", "absent does not exist")


def test_no_weights(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no weights")


def test_a_file_instead_of_a_folder(hf):
    refused(hf / "config.json", "is a file")


def test_missing_shard(hf):
    (hf / "model-00001-of-00002.safetensors").unlink()
    refused(hf, "index.json names model-00001-of-00002.safetensors, which .* lacks")


def test_missing_shard_without_an_index(hf):
    (hf / "model-00001-of-00002.safetensors").unlink()
    (hf / "model.safetensors.index.json").unlink()
    refused(hf, "missing tensor transformer.embedding.*; and 11 more")


def test_broken_index(hf):
    (hf / "model.safetensors.index.json").write_text("{")
    refused(hf, "is no valid index")


@pytest.mark.parametrize("size", [0, 4, 300, -10])
def test_truncated_safetensors(hf, size):
    path = hf / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(hf, "00002.safetensors is damaged or cut short")


@pytest.mark.parametrize("size", [0, 4, 300, -10])
def test_truncated_bin(tmp_path, size):
    hf = write_hf(tmp_path / "hf", kind="bin", shards=2)
    path = hf / "pytorch_model-00002-of-00002.bin"
    path.write_bytes(path.read_bytes()[:size])
    refused(hf, "00002.bin is damaged or cut short")


def test_wrong_shape(hf):
    change(hf, lambda weights: weights.update({NORM: torch.ones(3, 4).half()}))
    refused(hf, rf"wrong shape of {NORM}: expected \[24\], got \[3, 4\]")
    change(hf, lambda w: w.update({NORM: torch.zeros(25)}))
    refused(hf, rf"wrong shape of {NORM}: expected \[24\], got \[25\]")


def test_unknown_key(hf):
    change(hf, lambda weights: weights.update({"transformer.extra": torch.ones(3).half()}))
    refused(hf, r"unknown source key transformer.extra of shape \[3\]")


def test_missing_key(hf):
    name = "transformer.encoder.layers.0.input_layernorm.weight"
    change(hf, lambda weights: weights.pop(name))
    refused(hf, rf"missing tensor {name}, expected shape \[24\]")


def test_quantised_weights(hf):
    change(hf, lambda weights: weights.update({NORM: torch.ones(24).to(torch.int8)}))
    refused(hf, "is torch.int8; expected fp32, bf16 or fp16")


def test_the_same_tensor_in_two_files(hf):
    name = "transformer.embedding.word_embeddings.weight"
    change(hf, lambda weights: weights.update({name: torch.ones(56, 24).half()}))
    refused(hf, f"{name} is both in model-00001-of-00002.safetensors and in model-00002-of")


@pytest.mark.parametrize(
    "name", ["transformer.rotary_pos_emb", "model.layers.0.self_attn.rotary_emb"]
)
def test_rotary_frequencies_are_ignored(hf, name):
    change(hf, lambda w: w.update({f"{name}.inv_freq": torch.ones(3).half()}))
    assert open_source(hf).problems == []


class Foreign:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_foreign_class_in_a_pickle(tmp_path, capsys, is_zip):
    hf = write_hf(tmp_path / "hf", kind="bin")
    content = {**random_weights(), "evil": Foreign()}
    path = hf / "pytorch_model.bin"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    refused(hf, "wants to run print")
    assert "run" not in capsys.readouterr().out


def test_foreign_class_in_a_rank_file(tmp_path):
    mg = ranks(tmp_path)
    path = mg / "iter_0000001/mp_rank_00/model_optim_rng.pt"
    rewrite(path, lambda saved: saved.update(args=Foreign()))
    refused(mg, "wants to run print")


def test_foreign_class_in_the_metadata_of_dist(hf, tmp_path):
    convert(hf, tmp_path / "dist", ConvertOptions(layout="dist"))
    (tmp_path / "dist/.metadata").write_bytes(pickle.dumps(Foreign()))
    refused(tmp_path / "dist", "its SHA-256 isn't")
    (tmp_path / "dist" / MANIFEST).unlink()
    refused(tmp_path / "dist", "builtins.print")


class Reached:
    """What a file could reach if it might call getattr."""

    def __reduce__(self):
        return getattr, (torch.Size, "__mro__")


def test_getattr_in_a_file_reaches_nothing(hf, tmp_path):
    convert(hf, tmp_path / "dist", ConvertOptions(layout="dist"))
    (tmp_path / "dist/.metadata").write_bytes(pickle.dumps(Reached()))
    (tmp_path / "dist" / MANIFEST).unlink()
    refused(tmp_path / "dist", "builtins.getattr")
    mg = ranks(tmp_path)
    path = mg / "iter_0000001/mp_rank_00/model_optim_rng.pt"
    rewrite(path, lambda saved: saved.update(args=Reached()))
    refused(mg, "wants to run")


WAYS_TO_WRITE_ENUMS = {
    "Python 3.11.2": lambda member, _protocol: (getattr, (type(member), member.name)),
    "Python 3.12": lambda member, _protocol: (type(member), (member.value,)),
}


@pytest.mark.parametrize("python", WAYS_TO_WRITE_ENUMS)
def test_enums_are_read_as_every_python_writes_them(tmp_path, monkeypatch, python):
    mg, hf = ranks(tmp_path), write_hf(tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(enum.Enum, "__reduce_ex__", WAYS_TO_WRITE_ENUMS[python])
        convert(hf, tmp_path / "dist", ConvertOptions(layout="dist"))
        path = mg / "iter_0000001/mp_rank_00/model_optim_rng.pt"
        rewrite(path, lambda saved: vars(saved["args"]).update(backend=AttnBackend.flash))
    assert_same(read_all(tmp_path / "dist"), read_all(hf))
    assert_same(read_all(mg), read_all(hf))


# What unpickling raises for these bytes: TypeError, UnicodeDecodeError, KeyError, and ValueError.
BROKEN_PICKLES = [b"\x80\x02NNR.", b"\x8c\x01\xff.", b"\x80\x02h\x09.", b"\x80\x02\x82\x07."]


@pytest.mark.parametrize("content", BROKEN_PICKLES)
def test_broken_pickles(hf, tmp_path, content):
    convert(hf, tmp_path / "dist", ConvertOptions(layout="dist"))
    (tmp_path / "dist/.metadata").write_bytes(content)
    (tmp_path / "dist" / MANIFEST).unlink()
    refused(tmp_path / "dist", ".metadata is damaged")
    mg = ranks(tmp_path)
    (mg / "iter_0000001/mp_rank_00/model_optim_rng.pt").write_bytes(content)
    refused(mg, "model_optim_rng.pt (is damaged|wants to run)")


def test_truncated_dist(hf, tmp_path):
    convert(hf, tmp_path / "dist", ConvertOptions(layout="dist"))
    path = next((tmp_path / "dist").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:3000])
    refused(tmp_path / "dist", "is missing, damaged or cut short")


FLIPPED = {  # the file of each layout, and from where to where bytes of it are flipped
    "mcore": ("iter_0000001/mp_rank_00/model_optim_rng.pt", 1600, 2400),  # its pickle
    "dist": ("__0_1.distcp", 0, 800),  # that of its first tensor
    "chatglm": ("model.safetensors", 0, 800),  # its header
}


@pytest.mark.parametrize("layout", FLIPPED)
def test_no_flipped_byte_is_a_traceback(tmp_path, layout):
    """What describes the tensors is damaged: they are read all the same, or refused."""
    new, seen = tmp_path / "new", set()
    options = ConvertOptions(layout=layout, parallel=ModelParallelConfig(), verify=False)
    convert(write_hf(tmp_path / "hf"), new, options)
    name, start, end = FLIPPED[layout]
    before = (new / name).read_bytes()
    for place in range(start, end, 2):
        (new / name).write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
        try:
            seen.add(len(read_all(new)))
        except CheckpointError:
            seen.add("refused")
    assert seen == {len(read_all(tmp_path / "hf")), "refused"}


def test_random_states_of_a_training_checkpoint_are_accepted(tmp_path):
    mg = ranks(tmp_path)
    state = {"random": random.getstate(), "numpy": np.random.get_state()}
    path = mg / "iter_0000001/mp_rank_00/model_optim_rng.pt"
    rewrite(path, lambda saved: saved.update(rng_state=[state], optimizer={"step": 3}))
    assert_same(read_all(mg), random_weights())


def test_config_without_a_field(hf):
    values = json.loads((hf / "config.json").read_text())
    del values["kv_channels"]
    (hf / "config.json").write_text(json.dumps(values))
    refused(hf, "config.json lacks kv_channels")


def test_config_of_another_family(hf):
    (hf / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(hf, "is of the family 'llama'")


def test_no_config(hf):
    (hf / "config.json").unlink()
    refused(hf, "config.json does not exist")


@pytest.mark.parametrize(
    ("cuts", "sentence"),
    [
        ({"tp": 3}, "num_attention_heads 8 is not divisible by --tp 3"),
        ({"pp": 3}, "num_layers 4 is not divisible by --pp 3"),
        ({"pp": 2, "layers_per_stage": "1,1"}, "adds up to 2 layers, but the model has 4"),
    ],
)
def test_sizes_that_do_not_divide(hf, cuts, sentence):
    refused(hf, sentence, ConfigError, parallel=ModelParallelConfig(**cuts))


def test_target_exists(hf, tmp_path):
    (tmp_path / "new").mkdir()
    refused(hf, "new exists", ConfigError)


@pytest.mark.parametrize("name", ["hf", "hf/new", "."])
def test_target_and_source_in_one_another(hf, tmp_path, name):
    refused(hf, "lie in one another", ConfigError, target=tmp_path / name, force=True)


def test_force_replaces_a_model_but_nothing_else(hf, tmp_path):
    write_hf(tmp_path / "new", weights={})
    convert(hf, tmp_path / "new", ConvertOptions(layout="chatglm", force=True))
    assert_same(read_all(tmp_path / "new"), random_weights())
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/love.txt").write_text("dear")
    target = tmp_path / "letters"
    refused(hf, "something other than a model", ConfigError, target=target, force=True)


def test_missing_rank_file(tmp_path):
    mg = ranks(tmp_path, tp=2, pp=2)
    shutil.rmtree(mg / "iter_0000001/mp_rank_01_000")
    refused(mg, "lacks rank files: tp 1 pp 0")


def test_missing_stage(tmp_path):
    mg = ranks(tmp_path, pp=2)
    shutil.rmtree(mg / "iter_0000001/mp_rank_00_001")
    refused(mg, "the files hold 2 layers, but the model has 4")


def test_truncated_rank_file(tmp_path):
    mg = ranks(tmp_path, tp=2)
    path = mg / "iter_0000001/mp_rank_01/model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-100])
    refused(mg, "mp_rank_01/model_optim_rng.pt is damaged or cut short")


def test_tracker_that_says_nothing(tmp_path):
    mg = ranks(tmp_path)
    (mg / "latest_checkpointed_iteration.txt").write_text("soon")
    refused(mg, "says 'soon'")


def test_tracker_of_an_absent_iteration(tmp_path):
    mg = ranks(tmp_path)
    (mg / "latest_checkpointed_iteration.txt").write_text("7")
    refused(mg, "says 7, but iter_0000007 does not exist")


def test_tracker_names_another_than_the_newest(tmp_path):
    mg = ranks(tmp_path)
    shutil.copytree(mg / "iter_0000001", mg / "iter_0000002")
    assert open_source(mg).path == mg / "iter_0000001"


@pytest.mark.parametrize("version", [None, 2.0])
def test_qkv_order_of_older_versions(tmp_path, version):
    mg = ranks(tmp_path)
    path = mg / "iter_0000001/mp_rank_00/model_optim_rng.pt"
    rewrite(path, lambda saved: saved.pop("checkpoint_version"))
    if version:
        rewrite(path, lambda saved: saved.update(checkpoint_version=version))
    refused(mg, f"checkpoint_version {version or 0}; its QKV rows are in another order")


def test_ranks_that_disagree_on_a_copy(tmp_path):
    mg = ranks(tmp_path, tp=2)
    path = mg / "iter_0000001/mp_rank_01/model_optim_rng.pt"
    rewrite(path, lambda saved: saved["model"]["decoder.final_layernorm.weight"].add_(1))
    refused(mg, "different copies of final_norm")
    with pytest.raises(CheckpointError, match="different copies of final_norm"):
        convert(mg, tmp_path / "dist", ConvertOptions(layout="dist"))  # torch's writer wraps it
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda saved: saved.update(iteration=7), "has iteration 7, but .* has 1"),
        (lambda saved: setattr(saved["args"], "seed", 3), "has seed 3, but .* has None"),
        (lambda saved: setattr(saved["args"], "params_dtype", torch.float32), "params_dtype"),
        (lambda saved: saved.update(model0=saved.pop("model")), "chunks"),
    ],
)
@pytest.mark.parametrize("cuts", [{"tp": 2}, {"pp": 2}], ids=str)
def test_rank_files_of_different_runs(tmp_path, change, sentence, cuts):
    mg = ranks(tmp_path, **cuts)
    rewrite(sorted(mg.rglob("model_optim_rng.pt"))[1], change)
    refused(mg, "different checkpoints")
    refused(mg, sentence)


def test_what_each_rank_has_of_its_own_may_differ(tmp_path):
    mg = ranks(tmp_path, tp=2)
    for rank, path in enumerate(sorted(mg.rglob("model_optim_rng.pt"))):
        rewrite(path, lambda saved, rank=rank: setattr(saved["args"], "rank", rank))
    assert_same(read_all(mg), random_weights())


def test_neither_config_nor_arguments(tmp_path):
    mg = ranks(tmp_path)
    (mg / "config.json").unlink()
    path = mg / "iter_0000001/mp_rank_00/model_optim_rng.pt"
    rewrite(path, lambda saved: saved.pop("args"))
    refused(mg, "has no saved arguments, and there is no config.json")


def test_full_disk(hf, monkeypatch):
    usage = shutil.disk_usage(hf)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=100))
    refused(hf, "but the disk has 0.00 GB free", ConfigError)


def test_an_interrupt_leaves_nothing(hf, monkeypatch):
    def open_writer(_layout, folder, *_rest):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "open_writer", open_writer)
    with pytest.raises(KeyboardInterrupt):
        convert(hf, hf.parent / "new", ConvertOptions(layout="mcore"))
    assert [path.name for path in hf.parent.iterdir()] == ["hf"]


# --- what others save, too ---


def test_fp64_is_read_as_fp32_in_every_layout(tmp_path, caplog):
    weights = random_weights(dtype=torch.float64)
    hf = write_hf(tmp_path / "hf", weights=weights)
    expected = {name: tensor.float() for name, tensor in weights.items()}
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"dtype": "float64"}))
    assert_same(read_all(hf), expected)
    assert "is in fp64, and is read as fp32" in caplog.text
    convert(hf, tmp_path / "fp32", ConvertOptions("chatglm"))
    assert json.loads((tmp_path / "fp32/config.json").read_text())["dtype"] == "float32"
    assert_same(read_all(write_hf(tmp_path / "bin", weights=weights, kind="bin")), expected)
    convert(hf, tmp_path / "mg", ConvertOptions("mcore", ModelParallelConfig(tp=2)))
    for file in (tmp_path / "mg").rglob("*.pt"):
        rewrite(file, lambda saved: saved["model"].update(doubled(saved["model"])))
    assert_same(read_all(tmp_path / "mg"), expected)


def doubled(weights):
    return {name: one.double() for name, one in weights.items() if isinstance(one, torch.Tensor)}


@pytest.mark.parametrize(
    ("wrapper", "inner"),
    [
        ("module.", ""),
        ("module._orig_mod.", ""),
        ("_forward_module._fsdp_wrapped_module.", "_checkpoint_wrapped_module."),
        ("base_model.model.", "_fsdp_wrapped_module._orig_mod."),
    ],
)
def test_names_of_a_wrapped_model_lose_what_tells_of_it(tmp_path, caplog, wrapper, inner):
    weights = random_weights()
    wrapped = {wrapper + re.sub(r"(mlp)", rf"{inner}\1", n): one for n, one in weights.items()}
    hf = write_hf(tmp_path / "hf", weights=wrapped, shards=2)
    assert_same(read_all(hf), weights)
    for one in re.findall(r"[^.]+\.(?:model\.)?", wrapper + inner):
        assert re.search(rf"names in .* have .*{one}.*, which is left out", caplog.text)


@pytest.mark.parametrize("place", ["state_dict", "module", "model"])
def test_weights_within_a_trainers_own_file_are_read(tmp_path, caplog, place):
    weights = random_weights()
    hf = write_hf(tmp_path / "hf", weights=weights, kind="bin")
    file = hf / "pytorch_model.bin"
    for is_zip in (True, False):
        saved = {place: weights, "optimizer": {}, "step": 3}
        torch.save(saved, file, _use_new_zipfile_serialization=is_zip)
        assert_same(read_all(hf), weights)
    said = f"has the weights in its entry {place}; optimizer, step is left out"
    assert caplog.text.count(said) == 1
    torch.save(weights | {"step": 3}, file)
    refused(hf, r"holds something other than named tensors with values \(step\)")
    torch.save(weights | {NORM: weights[NORM].to("meta")}, file)
    refused(hf, rf"holds something other than named tensors with values \({NORM}\)")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, name):
    hf = write_hf(tmp_path / "hf")
    (hf / name).unlink()
    (hf / name).symlink_to("../blobs/1234")
    refused(hf, rf"hf/{name} is a dead link: it leads to .*/blobs/1234, which isn't there")


def test_names_of_which_only_some_have_a_prefix_are_refused(tmp_path):
    weights = random_weights()
    weights["module." + NORM] = weights.pop(NORM)
    refused(write_hf(tmp_path / "hf", weights=weights), "unknown source key module.transformer")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"quantization_bit": 4}, "quantization_bit 4: its weights are quantised"),
        ({"quantization_config": {"quant_method": "gptq"}}, "a quantization_config: its weights"),
        ({"pre_seq_len": 128}, "pre_seq_len 128: it is of P-Tuning v2"),
    ],
)
def test_checkpoints_of_another_kind_are_refused_by_name(hf, values, sentence):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | values))
    refused(hf, sentence)


def test_types_that_no_model_comes_in_are_named(hf):
    change(hf, lambda weights: weights.update({NORM: weights[NORM].to(torch.float8_e4m3fn)}))
    refused(hf, "weights are quantised.*is torch.float8_e4m3fn; expected fp32, bf16 or fp16")
    change(hf, lambda weights: weights.update({NORM: weights[NORM].to(torch.int64)}))
    refused(hf, f"{NORM} is torch.int64; expected fp32, bf16 or fp16")
