"""The layout of transformers' own GlmForCausalLM: there and back, complete folders, refusals."""

import io
import json

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glm3cli.checkpoint.convert.convert import convert
from glm3cli.checkpoint.convert.inspect import inspect
from glm3cli.checkpoint.convert.preflight import check_request
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.family.members import CHATGLM3
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.data.tokens.fast.tokenizer import check_fast, to_fast
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import CheckpointError, ConfigError, DataError
from tests.support.checkpoints import SMALL, assert_same, random_weights, read_all, write_hf
from tests.support.tiny_tokenizer import tiny_tokenizer, tiny_tokenizer_folder

GLM = ConvertOptions("glm")
CHATGLM = ConvertOptions("chatglm")


def write_source(folder, **values):
    """An original folder with a tokenizer that can be read."""
    source = write_hf(folder, **values)
    pieces = (tiny_tokenizer_folder() / "tokenizer.model").read_bytes()
    (source / "tokenizer.model").write_bytes(pieces)
    return source


def names_in(folder):
    """The files of a folder but for the manifest, which tells where the model came from."""
    return {path.name for path in folder.iterdir()} - {"glm3-manifest.json"}


def change(folder, **values):
    """Changes fields of a folder's config.json; None takes one out."""
    raw = json.loads((folder / "config.json").read_text()) | values
    raw = {name: value for name, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.fixture
def glm(tmp_path):
    convert(write_source(tmp_path / "hf"), tmp_path / "glm", GLM)
    return tmp_path / "glm"


shapes = st.builds(
    lambda groups, heads, size, layers, hidden, ffn, rows: ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=4 * heads,
        num_query_groups=groups,
        kv_channels=size,
        padded_vocab_size=rows,
        seq_length=16,
        rope_ratio=50.0,
    ),
    groups=st.sampled_from([1, 2, 4]),
    heads=st.integers(1, 2),
    size=st.sampled_from([4, 8]),
    layers=st.integers(1, 2),
    hidden=st.integers(1, 20),
    ffn=st.integers(1, 20),
    rows=st.integers(1, 40),
)


@settings(max_examples=25)
@given(
    model=shapes,
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    shard_bytes=st.sampled_from([300, 10**9]),
)
def test_round_trip_at_any_shape(tmp_path_factory, model, dtype, shard_bytes):
    folder = tmp_path_factory.mktemp("round")
    short = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    model = model.model_copy(update={"torch_dtype": short})
    weights = random_weights(model, dtype)
    source = write_source(folder / "hf", model=model, weights=weights)
    convert(source, folder / "glm", ConvertOptions("glm", shard_bytes=shard_bytes))
    assert open_source(folder / "glm").model == model
    assert_same(read_all(folder / "glm"), weights)
    convert(folder / "glm", folder / "back", CHATGLM)
    assert_same(read_all(folder / "back"), weights)


@pytest.mark.parametrize(
    ("layout", "cuts"),
    [
        ("mcore", {}),
        ("mcore", {"tp": 2, "pp": 2}),
        ("mcore", {"tp": 4}),
        ("legacy", {"tp": 2, "pp": 2, "vpp": 2}),
        ("dist", {}),
        ("glm", {}),
    ],
    ids=str,
)
def test_round_trip_through_every_layout(tmp_path, glm, layout, cuts):
    convert(glm, tmp_path / "mg", ConvertOptions(layout, parallel=ModelParallelConfig(**cuts)))
    convert(tmp_path / "mg", tmp_path / "glm2", GLM)
    files = names_in(glm)
    assert files == names_in(tmp_path / "glm2")
    for name in files:
        assert (glm / name).read_bytes() == (tmp_path / "glm2" / name).read_bytes()
    assert_same(read_all(tmp_path / "mg"), random_weights())


def test_names_and_shapes_in_the_file(glm):
    tensors = load_file(glm / "model.safetensors")
    assert len(tensors) == 3 + SMALL.num_layers * 11
    original = random_weights()
    prefix = "transformer.encoder.layers.3."
    qkv = original[prefix + "self_attention.query_key_value.weight"]
    parts = qkv.split([SMALL.query_size, SMALL.kv_size, SMALL.kv_size])
    for letter, part in zip("qkv", parts, strict=True):
        assert torch.equal(tensors[f"model.layers.3.self_attn.{letter}_proj.weight"], part)
    up = tensors["model.layers.3.mlp.gate_up_proj.weight"]
    assert torch.equal(up, original[prefix + "mlp.dense_h_to_4h.weight"])
    assert torch.equal(tensors["lm_head.weight"], original["transformer.output_layer.weight"])


def test_shards_and_their_index(tmp_path):
    source = write_source(tmp_path / "hf")
    convert(source, tmp_path / "glm", ConvertOptions("glm", shard_bytes=9_000))
    index = json.loads((tmp_path / "glm/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * SMALL.num_parameters
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "glm" / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
    assert len(set(index["weight_map"].values())) > 3


def test_the_folder_is_complete(glm):
    tokenizer = tiny_tokenizer()
    eos = [2, tokenizer.special("<|user|>"), tokenizer.special("<|observation|>")]
    config = json.loads((glm / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("glm", ["GlmForCausalLM"])
    assert (config["eos_token_id"], config["pad_token_id"]) == (eos, 0)
    assert config["dtype"] == "float16"
    assert config["rope_parameters"]["rope_theta"] == 10_000.0
    generation = json.loads((glm / "generation_config.json").read_text())
    assert generation == {"eos_token_id": eos, "pad_token_id": 0}
    assert json.loads((glm / "tokenizer.json").read_text("utf-8")) == to_fast(tokenizer)
    assert "[gMASK]sop" in json.loads((glm / "tokenizer_config.json").read_text())["chat_template"]
    assert Tokenizer.load(glm).vocab_size == tokenizer.vocab_size
    assert not list(glm.glob("*.py"))


def test_how_a_model_samples_goes_with_it(tmp_path):
    source = write_source(tmp_path / "hf")
    (source / "generation_config.json").write_text(
        '{"eos_token_id": 5, "do_sample": true, "temperature": 0.8, "_from_model_config": true}'
    )
    convert(source, tmp_path / "new", GLM)
    told = json.loads((tmp_path / "new/generation_config.json").read_text())
    assert told.pop("eos_token_id")[0] == 2
    assert told == {"pad_token_id": 0, "do_sample": True, "temperature": 0.8}
    (source / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json holds no JSON object"):
        convert(source, tmp_path / "no", GLM)


def test_other_layouts_get_no_files_of_this_one(tmp_path, glm):
    convert(glm, tmp_path / "mg", ConvertOptions("mcore"))
    names = {"config.json", "iter_0000001", "latest_checkpointed_iteration.txt", "tokenizer.model"}
    assert names_in(tmp_path / "mg") == names
    config = json.loads((tmp_path / "mg/config.json").read_text())
    assert config == SMALL.to_hf()


@pytest.mark.parametrize("layout", ["mcore", "chatglm"])
def test_a_tokenizer_json_alone_and_its_added_tokens_come_along(tmp_path, glm, layout):
    ours = Tokenizer.load(glm)
    content = json.loads((glm / "tokenizer.json").read_text())
    added = {"id": ours.vocab_size, "content": "<n>", "special": False, "normalized": True}
    added |= dict.fromkeys(["single_word", "lstrip", "rstrip"], False)
    content["added_tokens"].append(added)
    (glm / "tokenizer.json").write_text(json.dumps(content))
    (glm / "tokenizer.model").unlink()
    text, ids = "the fox <n>over", [*ours.encode("the fox"), ours.vocab_size]
    convert(glm, tmp_path / "other", ConvertOptions(layout))
    convert(tmp_path / "other", tmp_path / "back", GLM)
    for folder in (tmp_path / "other", tmp_path / "back"):
        again = Tokenizer.load(folder)
        assert again.path.name == "tokenizer.model"
        assert again.encode(text)[: len(ids)] == ids
        assert again.decode(again.encode(text)) == text
    again = json.loads((tmp_path / "back/tokenizer.json").read_text())
    assert again["added_tokens"] == content["added_tokens"]


def test_a_cast_is_told_by_the_config(tmp_path, glm):
    convert(glm, tmp_path / "bf16", ConvertOptions("glm", dtype="bf16"))
    assert json.loads((tmp_path / "bf16/config.json").read_text())["dtype"] == "bfloat16"


def test_without_a_tokenizer(tmp_path, caplog):
    source = write_source(tmp_path / "hf")
    convert(source, tmp_path / "mg", ConvertOptions("mcore"))
    assert caplog.text == ""
    (source / "tokenizer.model").unlink()
    for layout in ("glm", "legacy", "chatglm"):
        caplog.clear()
        convert(source, tmp_path / layout, ConvertOptions(layout))
        assert "hf has no tokenizer.model or tokenizer.json" in caplog.text
        assert f"{layout} can't be used by itself" in caplog.text
    assert json.loads((tmp_path / "glm/config.json").read_text())["eos_token_id"] == [2]
    assert not list((tmp_path / "glm").glob("tokenizer*"))


def test_the_names_of_the_tensors_go_before_the_config(tmp_path, glm):
    (glm / "config.json").write_text(json.dumps(SMALL.to_hf()))
    assert open_source(glm).layout == "glm"
    original = write_source(tmp_path / "original")
    (original / "config.json").write_text(json.dumps(SMALL.to_glm()))
    assert open_source(original).layout == "chatglm"


def test_inspection_shows_what_is_missing(glm):
    assert (inspect(glm).layout, inspect(glm).problems) == ("glm", [])
    tensors = load_file(glm / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_proj.bias"]
    tensors["extra"] = torch.zeros(1)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:].clone()
    save_file(tensors, glm / "model.safetensors")
    found = inspect(glm)
    assert found.missing == ["model.layers.2.self_attn.k_proj.bias"]
    assert found.extra == ["extra"]
    with pytest.raises(
        CheckpointError,
        match=r"missing tensor model\.layers\.2\.self_attn\.k_proj\.bias, expected shape \[8\]",
    ):
        open_source(glm)


def test_parts_of_two_types_are_read_as_the_one_that_holds_both(glm):
    tensors = load_file(glm / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.bias"
    tensors[name] = tensors[name].float()
    save_file(tensors, glm / "model.safetensors")
    found = read_all(glm)["transformer.encoder.layers.0.self_attention.query_key_value.bias"]
    assert found.dtype == torch.float32
    assert torch.equal(found.half(), random_weights()[_BIAS])


_BIAS = "transformer.encoder.layers.0.self_attention.query_key_value.bias"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"tie_word_embeddings": True}, "has tie_word_embeddings True"),
        ({"attention_bias": False}, "unknown source key model.layers.0.self_attn.k_proj.bias"),
        ({"attention_bias": "no"}, "add_qkv_bias no: "),
        (
            {"attention_bias": False, "partial_rotary_factor": 1.0},
            "is of GLM-Edge: it rotates whole heads, and its queries and keys have no bias",
        ),
        ({"model_type": "glm4"}, "missing tensor model.layers.0.post_self_attn_layernorm.weight"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
        ({"partial_rotary_factor": 1.0, "rope_parameters": None}, "has partial_rotary_factor 1.0"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            "has partial_rotary_factor 0.25",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "has the RoPE scaling 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "has the RoPE scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}, "rope_parameters": None}, "the factor None"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "the factor 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "the factor '2'"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "the factor nan"),
        ({"rope_parameters": None, "rope_theta": "big"}, "has rope_theta 'big'"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_ratio"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple"),
        ({"head_dim": None}, "lacks head_dim"),
        ({"dtype": "int8"}, "has dtype 'int8'"),
        ({"model_type": "llama"}, "is of the family 'llama'"),
    ],
    ids=str,
)
def test_other_models_are_refused(glm, values, sentence):
    change(glm, **values)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        open_source(glm)
    assert caught.value.hint


def test_the_rotary_base_in_either_spelling(glm):
    change(glm, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    assert open_source(glm).model.rope_ratio == 50.0
    change(glm, rope_parameters=None, rope_theta=20_000)
    assert open_source(glm).model.rope_ratio == 2.0
    change(glm, rope_theta=None)
    assert open_source(glm).model.rope_ratio == 1.0


@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": None},
        {"rope_scaling": {"rope_type": "linear", "factor": 4}, "rope_parameters": None},
        {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 4}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ],
    ids=["transformers 4", "its later versions", "both", "transformers 5"],
)
def test_linear_scaling_in_every_spelling_is_what_transformers_reads(glm, values):
    from transformers import GlmConfig

    change(glm, **values)
    model = open_source(glm).model
    assert (model.rope_factor, model.rope_ratio) == (4.0, 1.0)
    read = GlmConfig.from_pretrained(glm).rope_parameters
    assert (read["rope_type"], read["factor"], read["rope_theta"]) == ("linear", 4.0, 1e4)
    # Written again, it is the same to both, and to our other layouts.
    for number, config in enumerate((model.to_glm(), model.to_hf())):
        file = glm / f"{number}.json"
        file.write_text(json.dumps(config))
        assert ModelConfig.from_file(file).rope_factor == 4.0


def test_the_remote_code_has_no_scaling(glm, tmp_path):
    change(glm, rope_parameters={"rope_type": "linear", "factor": 4.0})
    with pytest.raises(ConfigError, match=r"divides its positions by 4\.0") as caught:
        check_request(glm, tmp_path / "new", CHATGLM)
    assert caught.value.hint == "use --layout glm"


def test_a_tokenizer_that_cannot_be_written_is_refused_at_once(tmp_path):
    source = write_hf(tmp_path / "hf")  # its tokenizer.model is no such file
    with pytest.raises(DataError, match="is not a sentencepiece model"):
        check_request(source, tmp_path / "glm", GLM)
    check_request(source, tmp_path / "glm", CHATGLM)


AS_IT_IS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    ("reason", "words", "how"),
    [
        ("no plain BPE", "", {"model_type": "unigram", "byte_fallback": True}),
        ("no plain BPE", "", {"byte_fallback": True, "user_defined_symbols": ["ab", "cd"]}),
        ("changes text", "", {"byte_fallback": True}),
        ("no byte fallback", "", AS_IT_IS),
        ("called as special tokens: sop", "xsop sop " * 9, AS_IT_IS | {"byte_fallback": True}),
    ],
    ids=str,
)
def test_tokenizers_of_another_kind_are_refused(tmp_path, reason, words, how):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"a quick brown fox jumps over the lazy dog {words}"] * 20),
        model_writer=model,
        character_coverage=1.0,
        vocab_size=320,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"model_type": "bpe"} | how,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(DataError, match=reason):
        check_fast(Tokenizer.load(path))


def test_every_merge_makes_a_piece_and_the_special_tokens_have_their_ids():
    tokenizer = tiny_tokenizer()
    content = to_fast(tokenizer)
    vocab = content["model"]["vocab"]
    assert len(vocab) == tokenizer.vocab_size - len(CHATGLM3.special)
    made = [left + right for left, right in content["model"]["merges"]]
    scores = [tokenizer.vocabulary.pieces.get_score(vocab[name]) for name in made]
    assert scores == sorted(scores, reverse=True)
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    assert {name: added[name] for name in CHATGLM3.special} == {
        name: tokenizer.special(name) for name in CHATGLM3.special
    }
