"""Folders that other programs load as they are, and what is said of those that they don't."""

import json
import re
import shutil
from pathlib import Path

import pytest

from glm3cli.checkpoint.convert.convert import convert
from glm3cli.checkpoint.convert.serving import SERVERS, how_to_use, obstacles
from glm3cli.checkpoint.locate import locate
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.model import ModelConfig
from glm3cli.data.tokens.tokenizer import Tokenizer
from tests.support.checkpoints import SMALL, write_hf
from tests.support.project import call
from tests.support.shared import SHARED, needs_shared
from tests.support.tiny_tokenizer import tiny_tokenizer_folder

CODE = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}}


def content(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def write_source(folder: Path, *, code: bool = True, model: ModelConfig = SMALL, **config) -> Path:
    """A folder as the original models are published, with the files of its code or without."""
    write_hf(folder, model=model)
    for path in folder.glob("*.py"):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(
        (tiny_tokenizer_folder() / "tokenizer.model").read_bytes()
    )
    values = {**content(folder / "config.json"), "auto_map": CODE, **config}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    for name in ("configuration", "modeling", "tokenization") if code else ():
        (folder / f"{name}_chatglm.py").write_text("# the original code\n")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    """Exports of a tuned model: in both layouts, and with the original code and without."""
    place = tmp_path_factory.mktemp("exported")
    source = write_source(place / "source", _name_or_path="THUDM/chatglm3-6b")
    bare = write_source(place / "bare_source", code=False)
    folders = {"glm": source, "code": source, "bare": bare, "mg": bare}
    for name, origin in folders.items():
        layout = {"glm": "glm", "mg": "mcore"}.get(name, "chatglm")
        convert(origin, place / name, ConvertOptions(layout))
    return {name: place / name for name in folders}


def said(folder: Path, server) -> str:
    return "\n".join(obstacles(locate(folder), server))


def test_each_program_has_a_folder_that_it_loads_as_it_is(exported):
    assert said(exported["code"], "mindie") == ""
    assert said(exported["code"], "llama.cpp") == ""
    for name in ("glm", "bare"):
        assert said(exported[name], "vllm") == ""
    assert said(exported["glm"], "transformers") == ""
    assert how_to_use(exported["code"], "vllm").endswith("code --trust-remote-code")
    assert how_to_use(exported["glm"], "vllm").endswith("glm")


def test_an_export_names_its_model_and_only_code_that_is_there(exported):
    config = content(exported["bare"] / "config.json")
    assert config["_name_or_path"] == "THUDM/chatglm3-6b"
    assert "auto_map" not in config
    assert "auto_map" not in content(exported["bare"] / "tokenizer_config.json")
    ends = content(exported["bare"] / "generation_config.json")
    assert ends == content(exported["glm"] / "generation_config.json")
    assert len(ends["eos_token_id"]) == 3
    assert content(exported["code"] / "config.json")["auto_map"] == CODE
    assert content(exported["code"] / "tokenizer_config.json") == TOKENIZER
    assert not (exported["code"] / "tokenizer.json").exists()


def test_transformers_reads_the_tokens_of_an_export_without_code(exported):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported["bare"], local_files_only=True)
    ours = Tokenizer.load(exported["bare"])
    for text in ("the quick brown fox", "  你好 世界\n", ""):
        assert theirs(text)["input_ids"] == [*ours.prefix, *ours.encode(text)]
    turns = [{"role": "user", "content": "the fox"}]
    prompt = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    assert prompt["input_ids"][:3] == [*ours.prefix, ours.special("<|user|>")]
    assert prompt["input_ids"][-1] == ours.special("<|assistant|>")


REFUSALS = {
    "not converted": ("mg", "vllm", {}, "glm3 convert mg2hf .* NEW --layout glm"),
    "not converted, MindIE": ("mg", "mindie", {}, "--layout chatglm"),
    "a name that says nothing": (
        "code", "mindie", {"_name_or_path": "/data/tuned"}, "_name_or_path '/data/tuned'"
    ),
    "a name for llama.cpp": (
        "code", "llama.cpp", {"_name_or_path": "zai-org/chatglm3-6b"}, "THUDM/chatglm3-6b is in it"
    ),
    "no code for MindIE": ("bare", "mindie", {}, "builds its prompts by the original tokenizer"),
    "no code for llama.cpp": ("bare", "llama.cpp", {}, "by the original tokenizer's code"),
    "transformers and code": ("code", "transformers", {}, "doesn't run in 5: --layout glm"),
    "transformers and no code": ("bare", "transformers", {}, "no class for the model type chatglm"),
    "a class without its default": ("code", "vllm", {"original_rope": None}, "lacks original_rope"),
    "positions that are divided": (
        "code", "vllm", {"rope_ratio": 16, "rope_kind": "positions"}, "divides positions"
    ),
    "the same in llama.cpp": (
        "code", "llama.cpp", {"rope_ratio": 16, "rope_kind": "positions"}, "texts come out wrong"
    ),
    "a base that MindIE doesn't read": (
        "glm", "mindie", {"rope_theta": 5e6, "_name_or_path": "THUDM/glm-4-9b-chat",
                          "rope_parameters": None}, "never rope_theta"
    ),
    "a base that llama.cpp doesn't read": (
        "glm", "llama.cpp", {"rope_theta": 5e6, "rope_parameters": None}, "reads rope_ratio of"
    ),
    "an epsilon that llama.cpp doesn't read": (
        "glm", "llama.cpp", {"layernorm_epsilon": None, "rms_norm_eps": 1e-7},
        "reads layernorm_epsilon of"
    ),
    "a vocabulary without a size": (
        "code", "llama.cpp", {"_name_or_path": "THUDM/glm-4-9b-chat"}, "lacks vocab_size"
    ),
    "other names for MindIE": ("glm", "mindie", {}, "with the original names only"),
    "0414 in MindIE": ("glm", "mindie", {"model_type": "glm4"}, "no model of the type glm4"),
    "code that is gone": (
        "code", "vllm", {"auto_map": {"AutoConfig": "gone.Config"}}, "names gone.py"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "server", "changes", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_would_not_load_is_said(exported, tmp_path, name, server, changes, message):
    folder = shutil.copytree(exported[name], tmp_path / name)
    values = {**content(folder / "config.json"), **changes}
    values = {name: value for name, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    found = said(folder, server)
    assert re.search(message, found), found


def test_a_folder_without_tokenizer_or_template(exported, tmp_path):
    folder = shutil.copytree(exported["glm"], tmp_path / "glm")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    for server in SERVERS:
        assert "neither a tokenizer.json nor the original tokenizer's code" in said(folder, server)
    assert "no chat template" in said(folder, "vllm")
    assert "no tokenizer.json" in said(folder, "transformers")


def test_the_command_line(exported):
    inspect = ["convert", "inspect", str(exported["code"]), "--for"]
    ended = call(*inspect, "mindie")
    assert ended.code == 0
    assert f"mindie loads it as it is: set modelWeightPath to {exported['code']}" in ended.out
    ended = call(*inspect, "transformers", "--json")
    assert ended.code == 3
    assert json.loads(ended.out)["for"]["obstacles"]
    assert "error: transformers doesn't load" in ended.err


@needs_shared
def test_an_export_with_the_real_tokenizer_is_loaded_by_all(tmp_path):
    model = SMALL.model_copy(update={"padded_vocab_size": 65_024})
    source = write_hf(tmp_path / "hf", model=model)
    for path in (SHARED / "chatglm3-6b").iterdir():
        if path.name != "config.json":
            shutil.copyfile(path, source / path.name)
    (source / "tokenization_chatglm.py").unlink()
    convert(source, tmp_path / "new", ConvertOptions("chatglm"))
    assert said(tmp_path / "new", "vllm") == ""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new", local_files_only=True)
    ours = Tokenizer.load(SHARED / "chatglm3-6b")
    text = "湖泊是什么 A lake, 3.14 <|user|"
    assert tokenizer(text)["input_ids"] == [*ours.prefix, *ours.encode(text)]
