"""Packs: every sample once and whole, as full as best-fit decreasing makes them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.packs import best_fit_decreasing
from glm3cli.data.preprocess.run import preprocess
from glm3cli.data.samples.instructions import joined
from glm3cli.errors import ConfigError
from tests.support.tiny_tokenizer import tiny_tokenizer_folder


def plain_best_fit(lengths, room):
    """The definition, with a search through all packs for every sample."""
    packs, left = [], []
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [i for i, space in enumerate(left) if space >= lengths[sample]]
        if fitting:
            best = min(fitting, key=lambda i: left[i])
        else:
            best = len(packs)
            packs.append([])
            left.append(room)
        packs[best].append(sample)
        left[best] -= lengths[sample]
    return sorted(left)


@settings(max_examples=300)
@given(lengths=st.lists(st.integers(1, 40), max_size=60), room=st.integers(40, 90))
def test_every_sample_once_and_packs_as_full_as_by_the_definition(lengths, room):
    packs = best_fit_decreasing(np.array(lengths, dtype=np.int32), room)
    assert sorted(sample for pack in packs for sample in pack) == list(range(len(lengths)))
    left = [room - sum(lengths[i] for i in pack) for pack in packs]
    assert all(space >= 0 for space in left)
    assert sorted(left) == plain_best_fit(lengths, room)
    assert packs == sorted(sorted(pack) for pack in packs)


def run(folder, rows, name, **options):
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"input": [source], "tokenizer": tiny_tokenizer_folder(), "handler": "chat"}
    values |= {"output_prefix": folder / name, "workers": 1, "seq_length": 64, **options}
    return preprocess(PreprocessConfig.parse(values))


def sequences(prefix, key):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    file = IndexedDataset(f"{prefix}_packed_{key}_document")
    assert file.document_indices.tolist() == list(range(len(file) + 1))
    return [file[i].tolist() for i in range(len(file))]


def test_packed_files_hold_the_samples_and_their_boundaries(tmp_path):
    rows = [{"instruction": "the fox", "output": "the lazy dog " * n} for n in range(1, 25)]
    whole = run(tmp_path, rows, "whole")
    packed = run(tmp_path, rows, "packed", pack=True)
    keys = ("input_ids", "labels", "attention_mask")
    samples = {key: sequences(tmp_path / "whole", key) for key in keys}
    packs = {key: sequences(tmp_path / "packed", key) for key in keys}
    assert len(packs["input_ids"]) < len(samples["input_ids"])
    found = []
    for ids, labels, numbers in zip(*packs.values(), strict=True):
        assert len(ids) == len(labels) == len(numbers) <= 64
        assert set(np.diff(numbers)) <= {0, 1}
        for number in range(1, numbers[-1] + 1):
            places = [i for i, n in enumerate(numbers) if n == number]
            found.append(([ids[i] for i in places], [labels[i] for i in places]))
    expected = list(zip(samples["input_ids"], samples["labels"], strict=True))
    assert sorted(found) == sorted(expected)
    assert (packed.documents, packed.tokens) == (whole.documents, whole.tokens)
    assert packed.fill_rate == packed.tokens / (64 * len(packs["input_ids"]))
    assert whole.fill_rate is None
    stats = json.loads((tmp_path / "packed.stats.json").read_text())
    assert (stats["sequences"], stats["packs"]) == (24, len(packs["input_ids"]))
    assert stats["fill_rate"] == packed.fill_rate > 0.8


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seq_length": None}, "--pack needs --seq-length"),
        ({"handler": "text", "seq_length": None}, "--pack go with the handlers instruction"),
    ],
)
def test_what_can_not_be_packed(tmp_path, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        run(tmp_path, [{"text": "a"}], "out", pack=True, **options)


def test_the_segments_of_joined_samples_are_numbered_through():
    ids = [[1, 1, 2], [1, 1], [1, 2, 3]]
    for stride, expected in ((1, [1, 1, 2, 3, 3, 4, 5, 6]), (2, [1, 1, 2, 3, 3, 5, 6, 7])):
        parts = [{"segment_ids": np.array(part)} for part in ids]
        assert joined(parts, stride)["segment_ids"].tolist() == expected
