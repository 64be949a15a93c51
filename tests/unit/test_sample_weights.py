"""Weights of samples: a column of the data, an optional pair of files, and the loss mask."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.kinds import ANSWERS
from glm3cli.data.prefixes import Blend, data_fingerprint
from glm3cli.data.preprocess.run import preprocess
from glm3cli.data.preprocess.writing.write import Summary
from glm3cli.data.samples.instructions import build_instruction
from glm3cli.data.samples.spec import Dataset, DataSpec
from glm3cli.errors import DataError
from tests.support.tiny_tokenizer import tiny_tokenizer, tiny_tokenizer_folder

ROWS = [
    {"instruction": "the dog", "output": "a fox", "weight": 2},
    {"instruction": "the fox", "output": "seven wizards", "weight": "0.25"},
    {"instruction": "a box", "output": "a lazy dog"},
    {"instruction": "never", "output": "trained", "weight": 0},
    {"instruction": "the quick", "output": "brown fox", "weight": None},
]
WEIGHTS = [2.0, 0.25, 1.0, 1.0]


def made(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Summary:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    options = {
        "input": [file],
        "tokenizer": tiny_tokenizer_folder(),
        "output_prefix": folder / "data",
        "handler": "chat",
        "workers": 1,
        "force": True,
        **changes,
    }
    return preprocess(PreprocessConfig.parse(options))


def dataset(folder: Path, **changes: Any) -> Dataset:
    spec = DataSpec(Blend((str(folder / "data"),), None), "1,0,0", 64, 1, 8, 0, **changes)
    return build_instruction(spec, tiny_tokenizer())[0]


def weights_in(data: Dataset) -> list[float]:
    """The weight of each sample of an epoch, which all its trained tokens have; in order."""
    found = []
    for index in range(len(data)):
        sample = data[index]
        for segment in range(1, int(sample["segment_ids"].max()) + 1):
            values = set(sample["loss_mask"][sample["segment_ids"] == segment].tolist()) - {0.0}
            assert len(values) == 1
            found += values
    return sorted(found)


def test_a_column_becomes_weights_of_tokens(tmp_path: Path) -> None:
    summary = made(tmp_path, ROWS)
    assert summary.skipped == 1  # the row that weighs nothing
    assert any("_packed_weights_document.bin" in file for file in summary.files)
    assert weights_in(dataset(tmp_path)) == sorted(WEIGHTS)
    assert weights_in(dataset(tmp_path, packing=True)) == sorted(WEIGHTS)


def test_packs_keep_the_weights_of_their_samples(tmp_path: Path) -> None:
    made(tmp_path, ROWS, pack=True, seq_length=64)
    assert len(dataset(tmp_path)) < len(WEIGHTS)
    assert weights_in(dataset(tmp_path)) == sorted(WEIGHTS)


def test_without_weights_there_are_the_three_pairs_of_modellink(tmp_path: Path) -> None:
    made(tmp_path, ROWS)
    weighted = data_fingerprint(str(tmp_path / "data"), ANSWERS)
    summary = made(tmp_path, [{**row, "weight": 1} for row in ROWS])
    assert len(summary.files) == 6
    assert not [file for file in summary.files if "_packed_weights_" in file]
    # Nothing is left of the files that had weights.
    assert not list(tmp_path.glob("*_weights_*"))
    assert weights_in(dataset(tmp_path)) == [1.0] * 5
    assert data_fingerprint(str(tmp_path / "data"), ANSWERS) != weighted


@pytest.mark.parametrize("weight", [-1, "heavy", True, [1], float("nan"), 1e400])
def test_what_is_no_weight_is_a_bad_row(weight: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="weight expected a number of at least 0"):
        made(tmp_path, [{**ROWS[0], "weight": weight}])


def test_weights_of_other_samples_are_refused(tmp_path: Path) -> None:
    made(tmp_path, ROWS)
    kept = {path: path.read_bytes() for path in tmp_path.glob("data_packed_weights*")}
    made(tmp_path, ROWS[:2])
    for path, content in kept.items():
        path.write_bytes(content)
    with pytest.raises(DataError, match="the weights of its samples are of others"):
        dataset(tmp_path)


def test_weights_are_kept_to_the_last_bit(tmp_path: Path) -> None:
    made(tmp_path, [{**ROWS[0], "weight": 1 / 3}])
    assert weights_in(dataset(tmp_path)) == [float(np.float32(1 / 3))]
