"""The convert commands as a user meets them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glm3cli.cli.convert import app
from glm3cli.errors import CheckpointError, ConfigError
from tests.support.adapters import write_adapter
from tests.support.checkpoints import SMALL, assert_same, random_weights, read_all, write_hf

runner = CliRunner()


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf")


def run(*args):
    result = runner.invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def python(code, **values):
    """Runs code in a fresh process; gives its output and seconds."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **values
    )
    return done, time.monotonic() - start


def test_there_and_back(hf, tmp_path):
    result = run("hf2mg", hf, tmp_path / "mg", "--tp", 2, "--pp", 2)
    assert result.stdout.startswith(f"{tmp_path / 'mg'}: mcore, 31 tensors, 0.00 GB in ")
    assert result.stdout.endswith("read back and compared, same logits\n")
    run("mg2mg", tmp_path / "mg", tmp_path / "mg2", "--format", "legacy", "--num-layer-list", "4")
    run("mg2hf", tmp_path / "mg2", tmp_path / "back", "--shard-size", "10KB")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert_same(read_all(tmp_path / "back"), random_weights())


def test_megatron_spellings(hf, tmp_path):
    args = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)
    run("hf2mg", hf, tmp_path / "mg", *args, "--no-verify")
    assert (tmp_path / "mg/iter_0000001/mp_rank_01_001").is_dir()


def test_dist_ignores_tp_and_pp(hf, tmp_path):
    run("hf2mg", hf, tmp_path / "dist", "--format", "dist", "--tp", 3, "--pp", 5)
    assert_same(read_all(tmp_path / "dist"), random_weights())


def test_json_result(hf, tmp_path):
    found = json.loads(run("hf2mg", hf, tmp_path / "mg", "--json", "--dtype", "fp32").stdout)
    assert (found["source"], found["target"]) == (str(hf), str(tmp_path / "mg"))
    assert found["bytes"] > 4 * SMALL.num_parameters
    assert (found["tensors"], found["verified"]) == (31, True)
    assert found["seconds"] > 0
    assert found["peak_private_bytes"] > 0


def test_options_from_a_file(hf, tmp_path):
    (tmp_path / "options.yaml").write_text("tp: 2\nformat: legacy\nforce: true\n")
    run("hf2mg", hf, tmp_path / "mg", "--config", tmp_path / "options.yaml", "--tp", 1)
    found = json.loads(run("inspect", tmp_path / "mg", "--json").stdout)
    assert (found["layout"], found["tp"]) == ("legacy", 1)


def test_force(hf, tmp_path):
    run("hf2mg", hf, tmp_path / "mg")
    with pytest.raises(ConfigError, match="exists"):
        run("hf2mg", hf, tmp_path / "mg")
    run("hf2mg", hf, tmp_path / "mg", "--tp", 2, "--force")
    assert (tmp_path / "mg/iter_0000001/mp_rank_01").is_dir()


@pytest.mark.parametrize("size", ["5", "1kb", "0.5GB", "3M"])
def test_shard_sizes(hf, tmp_path, size):
    run("mg2hf", hf, tmp_path / "new", "--shard-size", size, "--no-verify")


@pytest.mark.parametrize("size", ["", "5 GB", "GB", "5PB", "1.2.3GB"])
def test_shard_sizes_that_are_none(hf, tmp_path, size):
    with pytest.raises(ConfigError, match="--shard-size"):
        run("mg2hf", hf, tmp_path / "new", "--shard-size", size)


def test_inspect_shows_a_table(hf, tmp_path):
    run("hf2mg", hf, tmp_path / "mg", "--pp", 2, "--layers-per-stage", "1,3")
    shown = run("inspect", tmp_path / "mg").stdout
    assert "layout mcore, tp 1, pp 2 (1,3 layers), vpp 1, iteration 1" in shown
    assert "linear_qkv" in shown
    assert "float16" in shown


def test_inspect_shows_what_is_wrong(hf):
    from safetensors.torch import load_file, save_file

    weights = load_file(hf / "model.safetensors")
    weights["surplus"] = weights.pop("transformer.output_layer.weight")
    save_file(weights, hf / "model.safetensors")
    found = json.loads(run("inspect", hf, "--json").stdout)
    assert found["missing"] == ["transformer.output_layer.weight"]
    assert found["extra"] == ["surplus"]
    output = found["kinds"][-1]
    assert (output["count"], output["shape"]) == (0, [56, 24])
    assert "unknown source key surplus" in " ".join(run("inspect", hf).stdout.split())


def test_inspect_shows_the_manifest_and_checks_it(hf, tmp_path):
    run("hf2mg", hf, tmp_path / "mg")
    shown = " ".join(run("inspect", tmp_path / "mg", "--check").stdout.split())
    assert "(chatglm) by glm3" in shown
    assert "layout mcore, tp 1, pp 1, vpp 1, dtype keep; read back" in shown
    assert shown.endswith("checked: 6 files and 31 tensors are as written")
    found = json.loads(run("inspect", tmp_path / "mg", "--check", "--json").stdout)
    assert found["check"] == {"folder": str(tmp_path / "mg"), "files": 6, "tensors": 31}
    assert json.loads(run("inspect", tmp_path / "mg", "--json").stdout)["check"] is None
    (tmp_path / "mg/tokenizer.model").write_bytes(b"Pieces")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model differs"):
        run("inspect", tmp_path / "mg", "--check")


@pytest.mark.parametrize("name", ["hf2mg", "mg2hf", "mg2mg"])
def test_every_conversion_merges_an_adapter(hf, tmp_path, name):
    adapter = write_adapter(tmp_path / "adapter")
    found = json.loads(run(name, hf, tmp_path / "new", "--lora", adapter, "--json").stdout)
    assert (found["merged"], found["verified"]) == (16, True)
    assert f"lora {adapter}; read back" in run("inspect", tmp_path / "new").stdout


def test_an_adapter_gets_other_names(hf, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    options = ["--model", hf, "--layout", "glm"]
    done = run("adapter", adapter, tmp_path / "new", *options)
    shown = " ".join(done.stdout.split())
    assert shown.endswith("new: an adapter of 24 modules, named as in glm")
    found = json.loads(run("adapter", adapter, tmp_path / "2", *options, "--json").stdout)
    assert found == {
        "source": str(adapter),
        "target": str(tmp_path / "2"),
        "layout": "glm",
        "modules": 24,
    }


MISTAKES = [
    (
        ["adapter", "hf", "new", "--model", "hf", "--layout", "glm"],
        CheckpointError,
        "the adapter hf has no adapter_config.json",
    ),
    (["hf2mg", "hf", "new", "--lora", "hf"], CheckpointError, "has no adapter_config.json"),
    (["hf2mg", "absent", "new"], CheckpointError, "absent does not exist"),
    (["hf2mg", "hf", "new", "--tp", "3"], ConfigError, "not divisible by --tp 3"),
    (["hf2mg", "hf", "new", "--tp", "4", "--format", "legacy"], ConfigError, "not divisible by"),
    (["hf2mg", "hf", "new", "--vpp", "2"], ConfigError, "--vpp needs more than one"),
    (["hf2mg", "hf", "hf"], ConfigError, "lie in one another"),
]


@pytest.mark.parametrize(("args", "error", "sentence"), MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes_are_found_without_torch(hf, args, error, sentence):
    code = f"""
import sys
from glm3cli.cli.convert import app
from glm3cli.errors import Glm3Error
try:
    app({args!r}, standalone_mode=False)
except Glm3Error as error:
    print(error.exit_code, error.message)
print("torch" in sys.modules)
"""
    path = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": f"{Path.cwd()}:{path}"}
    done, _ = python(code, cwd=hf.parent, env=environment)
    assert done.stdout.startswith(f"{error.exit_code} "), done.stderr
    assert sentence in done.stdout
    assert done.stdout.endswith("False\n")


def test_help_needs_no_torch():
    code = """
import sys
from typer.testing import CliRunner
from glm3cli.cli.convert import app
for name in ("hf2mg", "mg2hf", "mg2mg", "inspect"):
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0, result.output
print([name for name in ("torch", "megatron", "numpy") if name in sys.modules])
"""
    done, _ = python(code)
    assert done.stdout == "[]\n", done.stderr
