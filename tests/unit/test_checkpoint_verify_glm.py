"""transformers itself verifies what is exported for it, and finds every fault that is put there."""

import json
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm3cli.checkpoint.convert import convert as module
from glm3cli.checkpoint.convert import verify, verify_glm
from glm3cli.checkpoint.convert.convert import convert
from glm3cli.config.convert import ConvertOptions
from glm3cli.errors import CheckpointError, StoppedError
from tests.support.checkpoints import random_weights, write_hf
from tests.support.tiny_tokenizer import tiny_tokenizer_folder

GLM = ConvertOptions("glm")


@pytest.fixture
def hf(tmp_path):
    """An original folder with a tokenizer that can be read."""
    pieces = tiny_tokenizer_folder() / "tokenizer.model"
    return write_hf(tmp_path / "hf", tokenizer=pieces.read_bytes())


@pytest.fixture
def inject(monkeypatch):
    """Lets a fault happen to the folder when all is written and nothing is verified."""

    def prepare(fault):
        def verify(layout, folder, *rest):
            fault(folder)
            return original(layout, folder, *rest)

        original = module.verify
        monkeypatch.setattr(module, "verify", verify)

    return prepare


def edit(name, change):
    """A fault that changes the content of a JSON file."""

    def fault(folder):
        content = json.loads((folder / name).read_text("utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content), "utf-8")

    return fault


def put(*path, value):
    """A change of one value of nested dictionaries and lists."""

    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def drop_merge(content):
    del content["model"]["merges"][0]


def drop_last_merge(content):
    del content["model"]["merges"][-1]


def swap_merges(content):
    merges = content["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def other_merge(content):
    merge = content["model"]["merges"][0]
    content["model"]["merges"][0] = merge[::-1]


def swap_pieces(content):
    vocab = content["model"]["vocab"]
    first, second = [piece for piece in vocab if not piece.startswith("<")][10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def drop_piece(content):
    vocab = content["model"]["vocab"]
    del vocab[next(piece for piece in reversed(vocab) if len(piece) == 1)]


def no_prefix(content):
    content["post_processor"] = None


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut_short(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


def surplus_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_pos_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


FAULTS = {
    "eos of the generation": (
        edit("generation_config.json", put("eos_token_id", value=[2])),
        r"reads eos_token_id \[2\] from generation_config\.json instead of \[2, 406, 408\]",
    ),
    "pad of the generation": (
        edit("generation_config.json", put("pad_token_id", value=2)),
        "reads pad_token_id 2 from generation_config",
    ),
    "eos of the config": (
        edit("config.json", put("eos_token_id", value=[2, 406])),
        r"reads eos_token_id \[2, 406\] from config\.json",
    ),
    "epsilon": (
        edit("config.json", put("rms_norm_eps", value=1e-6)),
        r"reads layernorm_epsilon 1e-06 from config\.json instead of 1e-05",
    ),
    "rotary base": (
        edit("config.json", put("rope_parameters", "rope_theta", value=10_001.0)),
        r"reads rope_ratio 1\.0001 from config\.json",
    ),
    "length": (
        edit("config.json", put("max_position_embeddings", value=64)),
        "reads seq_length 64",
    ),
    "type": (edit("config.json", put("dtype", value="bfloat16")), "reads torch_dtype 'bf16'"),
    "activation": (edit("config.json", put("hidden_act", value="gelu")), "has hidden_act 'gelu'"),
    "prefix": (edit("tokenizer.json", no_prefix), "reads '' as the ids"),
    "first merge": (edit("tokenizer.json", drop_merge), "as the ids"),
    "last merge": (edit("tokenizer.json", drop_last_merge), "holds None as merge 144"),
    "order of merges": (edit("tokenizer.json", swap_merges), "as merge 4 of the tokenizer"),
    "another merge": (edit("tokenizer.json", other_merge), "can't load it|as the ids"),
    "vocabulary": (edit("tokenizer.json", swap_pieces), "as the ids"),
    "a lost piece": (edit("tokenizer.json", drop_piece), "can't load it|as the ids"),
    "no tokenizer.json": (remove("tokenizer.json"), "."),
    "half a tokenizer.json": (cut_short("tokenizer.json"), "can't load it"),
    "no generation config": (remove("generation_config.json"), "can't load it"),
    "a surplus tensor": (surplus_tensor, "finds unexpected keys: .*inv_freq"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found(hf, tmp_path, inject, name):
    fault, sentence = FAULTS[name]
    inject(fault)
    with pytest.raises(CheckpointError, match=rf"new: transformers \S+ .*({sentence})") as caught:
        convert(hf, tmp_path / "new", GLM)
    assert "nothing was kept" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_sound_folder_passes_without_a_word(tmp_path, hf, dtype, capfd, recwarn):
    (hf / "model.safetensors").unlink()
    save_file(random_weights(dtype=dtype), hf / "model.safetensors")
    before = verify_chatter()
    assert convert(hf, tmp_path / "new", GLM).logits_difference == 0
    assert verify_chatter() == before
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()] == ["needs"]
    assert not recwarn.list


def verify_chatter():
    from transformers.utils import logging as chatter

    return chatter.get_verbosity(), chatter.is_progress_bar_enabled()


def test_other_logits_are_found(hf, tmp_path, monkeypatch):
    from transformers.models.glm import modeling_glm

    rotate_half = modeling_glm.rotate_half
    monkeypatch.setattr(modeling_glm, "rotate_half", lambda heads: -rotate_half(heads))
    with pytest.raises(CheckpointError, match=r"computes other logits than glm3 \(by \d"):
        convert(hf, tmp_path / "new", GLM)
    # Of a large model they aren't computed.
    monkeypatch.setattr(verify, "_MOST_PARAMETERS", 10_000)
    convert(hf, tmp_path / "new", GLM)


def test_the_tolerance_lies_far_from_rounding_and_from_errors(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(verify_glm, "_TOLERANCE", 2e-6)
    convert(hf, tmp_path / "fine", GLM)
    monkeypatch.setattr(verify_glm, "_TOLERANCE", 0.0)
    with pytest.raises(CheckpointError, match="computes other logits"):
        convert(hf, tmp_path / "new", GLM)


def test_values_that_are_not_finite_are_no_mismatch(hf, tmp_path):
    weights = random_weights()
    weights["transformer.output_layer.weight"][0, 0] = float("inf")
    save_file(weights, hf / "model.safetensors")
    assert convert(hf, tmp_path / "new", GLM).non_finite == 1


def test_sigterm_is_no_mismatch(tmp_path):
    with pytest.raises(StoppedError), verify_glm._sentences(tmp_path):
        raise StoppedError("stopped")


def test_advice_is_silenced_only_meanwhile(tmp_path, caplog):
    from transformers.utils import logging as chatter

    with verify_glm._sentences(tmp_path):
        chatter.get_logger("transformers").error("advice")
        warnings.warn("advice", UserWarning, stacklevel=1)
    with pytest.warns(UserWarning, match="advice"):
        warnings.warn("advice", UserWarning, stacklevel=1)
    assert "advice" not in caplog.text
    assert logging.getLogger("transformers").isEnabledFor(logging.ERROR)


PROGRAM = """
import socket, sys
def refuse(*_args, **_values):
    raise AssertionError("the network was asked")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from pathlib import Path
from glm3cli.checkpoint.convert.convert import convert
from glm3cli.config.convert import ConvertOptions
options = ConvertOptions(layout=sys.argv[3], verify=sys.argv[4] == "verify")
convert(Path(sys.argv[1]), Path(sys.argv[2]), options)
print("transformers" in sys.modules)
"""


@pytest.mark.parametrize(
    ("layout", "verified", "imported"),
    [
        ("chatglm", "verify", "False"),
        ("mcore", "verify", "False"),
        ("legacy", "verify", "False"),
        ("dist", "verify", "False"),
        ("glm", "not", "False"),
        ("glm", "verify", "True"),
    ],
)
def test_only_an_export_imports_transformers(hf, tmp_path, layout, verified, imported):
    command = [sys.executable, "-c", PROGRAM, hf, tmp_path / "new", layout, verified]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{imported}\n", done.stderr
    assert len(done.stderr.splitlines()) == 1  # what it needs
