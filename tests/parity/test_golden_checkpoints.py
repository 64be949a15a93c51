"""Our per-rank files against those that ModelLink 1.1's converter wrote, and the way back."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from glm3cli.checkpoint.convert.convert import convert
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.parallel import ModelParallelConfig
from tests.support.checkpoints import assert_same, read_all
from tests.support.shared import GOLDEN, needs_shared

pytestmark = needs_shared

CASES = {"tp1pp1": ModelParallelConfig(), "tp2pp2": ModelParallelConfig(tp=2, pp=2)}


def flatten(tree: dict, prefix: str) -> dict[str, dict]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, torch.Tensor):
            data = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            flat[prefix + name] = {
                "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch."),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        else:
            flat[prefix + name] = value
    return flat


@pytest.mark.parametrize("case", CASES)
def test_every_file_key_shape_type_and_hash(case, tmp_path):
    golden = json.loads((GOLDEN / f"hf2mg_{case}.json").read_text())["files"]
    options = ConvertOptions(layout="legacy", parallel=CASES[case])
    convert(GOLDEN / "hf_tiny", tmp_path / "mg", options)
    for name, expected in golden.items():
        path: Path = tmp_path / "mg" / name
        if "text" in expected:
            assert path.read_text() == expected["text"]
            continue
        saved = torch.load(path, weights_only=False)
        assert sorted(saved) == expected["top_keys"]
        found = flatten(saved["model"], "model/")
        assert {n: v for n, v in found.items() if v is not None} == expected["tensors"]
        empty = {n for n, v in expected["non_tensor"].items() if v["type"] == "NoneType"}
        assert {n for n, v in found.items() if v is None} == empty
    written = {str(p.relative_to(tmp_path / "mg")) for p in (tmp_path / "mg").rglob("mp_*/*")}
    assert written == {name for name in golden if name.endswith(".pt")}


@pytest.mark.parametrize("case", CASES)
def test_saved_arguments_agree_with_modellink(case, tmp_path):
    golden = json.loads((GOLDEN / f"hf2mg_{case}.json").read_text())["files"]
    options = ConvertOptions(layout="legacy", parallel=CASES[case])
    convert(GOLDEN / "hf_tiny", tmp_path / "mg", options)
    name = next(name for name in golden if name.endswith(".pt"))
    ours = vars(torch.load(tmp_path / "mg" / name, weights_only=False)["args"])
    theirs = golden[name]["args"]
    for key in theirs.keys() & ours.keys() - {"params_dtype", "model_type"}:
        assert ours[key] == theirs[key], key
    assert str(ours["params_dtype"]) == theirs["params_dtype"]["repr"]
    assert ours.keys() - theirs.keys() <= {"rope_ratio", "iteration"}


@pytest.mark.parametrize("case", CASES)
def test_modellinks_files_come_back_bit_by_bit(case, tmp_path):
    source = open_source(GOLDEN / f"modellink_{case}")
    assert (source.layout, source.parallel, source.iteration) == ("legacy", CASES[case], 1)
    convert(GOLDEN / f"modellink_{case}", tmp_path / "hf", ConvertOptions(layout="chatglm"))
    assert_same(read_all(tmp_path / "hf"), read_all(GOLDEN / "hf_tiny"))
