"""Samples out of preprocessed files, against the same rules written down again."""

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset

from glm3cli.data.kinds import ANSWERS, TEXT, DataKind
from glm3cli.data.prefixes import Blend
from glm3cli.data.samples.datasets import build_index, build_samples, build_text
from glm3cli.data.samples.instructions import build_instruction
from glm3cli.data.samples.order import consumed_by_part
from glm3cli.data.samples.spec import Dataset, DataSpec
from glm3cli.errors import DataError
from tests.support.samples import write_documents, write_instructions
from tests.support.tiny_tokenizer import tiny_tokenizer

SEED = 1234


def spec(*prefixes: str, weights: tuple[float, ...] | None = None, **changes: Any) -> DataSpec:
    values: dict[str, Any] = {
        "split": "1,0,0",
        "seq_length": 8,
        "seed": SEED,
        "num_train": 8,
        "num_valid": 0,
        **changes,
    }
    return DataSpec(blend=Blend(prefixes, weights), **values)


def answers(count: int, start: int = 0) -> list[tuple[list[int], list[int]]]:
    """Documents that are told apart by the only token of their answer."""
    return [([7, 7], [start + number]) for number in range(count)]


def answered(dataset: Dataset, count: int) -> list[int]:
    """The answers of the first samples of `answers` documents."""
    return [int(dataset[index]["labels"][1]) for index in range(count)]


# --- instructions ---


def test_a_sample_is_shifted_by_one(tmp_path):
    prefix = write_instructions(tmp_path / "a", [([11, 12, 13], [21, 22, 2])])
    train, valid = build_instruction(spec(prefix), tiny_tokenizer())
    sample = train[0]
    assert sample["tokens"].tolist() == [11, 12, 13, 21, 22]
    assert sample["labels"].tolist() == [0, 0, 21, 22, 2]
    assert sample["loss_mask"].tolist() == [0, 0, 1, 1, 1]
    types = {key: value.dtype.name for key, value in sample.items()}
    assert types.pop("loss_mask") == "float32"
    assert types == dict.fromkeys(("tokens", "labels", "segment_ids"), "int64")
    assert sample["segment_ids"].tolist() == [1, 1, 1, 1, 1]
    assert valid is None


def test_a_long_sample_is_cut_on_the_right(tmp_path):
    prefix = write_instructions(tmp_path / "a", [(range(10, 16), range(20, 26))])
    sample = build_instruction(spec(prefix), tiny_tokenizer())[0][0]
    assert sample["tokens"].tolist() == [10, 11, 12, 13, 14, 15, 20, 21]
    assert sample["labels"].tolist() == [0, 0, 0, 0, 0, 20, 21, 22]
    assert sample["loss_mask"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_samples_without_a_trained_token_are_left_out(tmp_path):
    """The others come in the order of a data set that never had them."""
    good = answers(6)
    empty = [([7] * 9, [1]), ([7, 7], []), ([7], [])]
    plain = write_instructions(tmp_path / "plain", good)
    mixed = write_instructions(tmp_path / "mixed", [*good[:2], *empty, *good[2:], *empty])
    for options in ({}, {"packing": True}):
        train, _ = build_instruction(spec(plain, **options), tiny_tokenizer())
        found, _ = build_instruction(spec(mixed, **options), tiny_tokenizer())
        assert len(found) == len(train)
        for index in range(12):
            assert found[index]["labels"].tolist() == train[index]["labels"].tolist()
    with pytest.raises(DataError, match="none of its 3 samples for validation"):
        build_instruction(spec(mixed, split="9,3,0", num_valid=4), tiny_tokenizer())


def test_a_sample_of_just_one_token_more_is_neither_cut_nor_padded(tmp_path):
    prefix = write_instructions(tmp_path / "a", [([1, 2], range(20, 27))])
    sample = build_instruction(spec(prefix), tiny_tokenizer())[0][0]
    assert sample["tokens"].tolist() == [1, 2, *range(20, 26)]
    assert sample["labels"].tolist() == [0, *range(20, 27)]


def test_an_epoch_is_one_shuffle_of_one_random_state_after_the_other(tmp_path):
    prefix = write_instructions(tmp_path / "a", answers(5))
    train, _ = build_instruction(spec(prefix), tiny_tokenizer())
    # ModelLink: RandomState(seed).shuffle(arange(start, stop)) per epoch, in turn.
    random, expected = np.random.RandomState(SEED), []
    for _ in range(3):
        order = np.arange(5)
        random.shuffle(order)
        expected += order.tolist()
    assert answered(train, 15) == expected
    assert len(train) == 5


def test_a_sample_is_the_same_whichever_was_read_before(tmp_path):
    prefix = write_instructions(tmp_path / "a", answers(5))
    forward, backward = (build_instruction(spec(prefix), tiny_tokenizer())[0] for _ in range(2))
    expected = answered(forward, 20)
    assert [int(backward[index]["labels"][1]) for index in reversed(range(20))] == expected[::-1]


def test_another_seed_is_another_order(tmp_path):
    prefix = write_instructions(tmp_path / "a", answers(20))
    orders = [
        answered(build_instruction(spec(prefix, seed=seed), tiny_tokenizer())[0], 20)
        for seed in (1, 2)
    ]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_training_and_validation_share_no_document(tmp_path):
    prefix = write_instructions(tmp_path / "a", answers(10))
    train, valid = build_instruction(spec(prefix, split="7,2,1", num_valid=4), tiny_tokenizer())
    assert valid is not None
    assert set(answered(train, 7)) == set(range(7))
    assert set(answered(valid, 2)) == {7, 8}


@pytest.mark.parametrize(
    ("split", "count", "num_train"),
    [
        ("949,50,1", 10, 9),
        ("949,50,1", 1000, 949),
        ("1,1,0", 3, 2),
        ("1,1,0", 5, 2),
        ("2,1,0", 3, 2),
    ],
)
def test_splits_are_rounded_as_megatron_does(split, count, num_train, tmp_path):
    # Python's round: halves go to the even number.
    prefix = write_instructions(tmp_path / "a", answers(count))
    train, _ = build_instruction(spec(prefix, split=split), tiny_tokenizer())
    assert len(train) == num_train


@pytest.mark.parametrize("build", [build_instruction, build_text])
def test_a_split_too_small_for_a_document_is_told(build, tmp_path):
    prefix = write_documents(tmp_path / "a", [[1, 2, 3]] * 4)
    write_instructions(tmp_path / "a", answers(4))
    with pytest.raises(DataError) as caught:
        build(spec(prefix, split="949,50,1", num_valid=8), tiny_tokenizer())
    assert caught.value.message == (
        f"--data {prefix}: --split 949,50,1 of 4 document(s) leaves none for validation"
    )
    assert "or drop --eval-interval" in caught.value.hint
    with pytest.raises(DataError, match="leaves none for training"):
        build(spec(prefix, split="1,99,0"), tiny_tokenizer())


def test_files_of_different_sizes_do_not_belong_together(tmp_path):
    prefix = write_instructions(tmp_path / "a", answers(3))
    write_documents(tmp_path / "a_packed_labels_document", [[1, 2]] * 2)
    with pytest.raises(DataError) as caught:
        build_instruction(spec(prefix), tiny_tokenizer())
    assert "different numbers of samples" in caught.value.message
    assert "'input_ids': 3" in caught.value.message
    assert "'labels': 2" in caught.value.message


def test_a_sample_whose_files_disagree_on_its_length_is_told(tmp_path):
    prefix = write_instructions(tmp_path / "a", [([1, 2], [3])])
    write_documents(tmp_path / "a_packed_labels_document", [[-100, -100, 3, 4, 5]])
    with pytest.raises(DataError, match="sample 0 has 3 tokens but 5 labels"):
        build_instruction(spec(prefix), tiny_tokenizer())


# --- text ---


def rederived_windows(documents: list[list[int]], seq_length: int, seed: int) -> list[list[int]]:
    """GPTDataset's samples of one epoch: documents shuffled, joined, cut, and shuffled again."""
    random = np.random.RandomState(seed)
    order = np.arange(len(documents), dtype=np.int32)
    random.shuffle(order)
    stream = [token for number in order for token in documents[number]]
    count = (len(stream) - 1) // seq_length
    places = np.arange(count, dtype=np.uint32)
    random.shuffle(places)
    return [stream[place * seq_length :][: seq_length + 1] for place in places]


def some_documents(count: int = 20) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, 100, random.integers(1, 30)).tolist() for _ in range(count)]


def test_text_samples_are_windows_of_the_shuffled_documents(tmp_path):
    documents = some_documents()
    prefix = write_documents(tmp_path / "a", documents)
    expected = rederived_windows(documents, 8, SEED)
    train, _ = build_text(spec(prefix, num_train=len(expected)), tiny_tokenizer())
    for index, window in enumerate(expected):
        sample = train[index]
        assert np.asarray(sample["tokens"]).tolist() == window[:-1]
        assert np.asarray(sample["labels"]).tolist() == window[1:]
        assert np.asarray(sample["loss_mask"]).tolist() == [1.0] * 8


def test_text_goes_on_after_an_epoch(tmp_path):
    prefix = write_documents(tmp_path / "a", [[10, 11, 12, 13, 14]] * 4)
    train, _ = build_text(spec(prefix, num_train=50), tiny_tokenizer())
    assert len(np.asarray(train[49]["tokens"])) == 8


def test_text_of_training_and_validation_shares_no_document(tmp_path):
    prefix = write_documents(tmp_path / "a", [[number] * 8 for number in range(10, 20)])
    train, valid = build_text(spec(prefix, split="8,2,0", num_valid=4), tiny_tokenizer())
    assert valid is not None
    assert seen(train, 8) <= set(range(10, 18))
    assert seen(valid, 4) <= {18, 19}


def seen(dataset: Dataset, count: int) -> set[int]:
    """All tokens of the first samples."""
    return {int(token) for index in range(count) for token in dataset[index]["tokens"]}


def test_text_that_was_preprocessed_again_is_read_anew(tmp_path):
    prefix = write_documents(tmp_path / "a", [[10] * 20, [11] * 20])
    assert seen(build_text(spec(prefix), tiny_tokenizer())[0], 8) == {10, 11}
    write_documents(tmp_path / "a", [[20] * 9, [21] * 9, [22] * 9, [23] * 9])
    train, _ = build_text(spec(prefix), tiny_tokenizer())
    assert seen(train, 8) == {20, 21, 22, 23}


def test_reading_text_leaves_no_file_beside_the_data(tmp_path):
    # It may lie on a read-only disk, and each machine may have one of its own.
    prefixes = [write_documents(tmp_path / name, [[10] * 20] * 4) for name in "ab"]
    before = sorted(tmp_path.rglob("*"))
    build_text(spec(*prefixes, weights=(0.5, 0.5)), tiny_tokenizer())
    build_text(spec(prefixes[0]), tiny_tokenizer())
    assert sorted(tmp_path.rglob("*")) == before


# --- indices built beforehand ---


def shown(parts) -> list[list[str]]:
    return [list(map(str, part[index].values())) for part in parts for index in range(4)]


def test_indices_built_beforehand_are_used(tmp_path, monkeypatch):
    prefix = write_documents(tmp_path / "a", some_documents())
    what = spec(prefix, split="8,2,0", num_train=30, num_valid=4)
    plain = [
        list(map(str, part[i].values()))
        for part in build_text(what, tiny_tokenizer())
        for i in range(4)
    ]
    folder = build_index(what, tiny_tokenizer())
    assert folder.parent == tmp_path / "a.samples"
    assert len(list(folder.glob("*.npy"))) == 6
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(GPTDataset, "_get_num_epochs", lambda *_arguments: pytest.fail("built"))
    assert shown(build_text(what, tiny_tokenizer())) == plain
    assert build_index(what, tiny_tokenizer()) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "changes", [{"seed": 5}, {"num_train": 31}, {"seq_length": 9}, {"split": "7,3,0"}], ids=str
)
def test_indices_of_other_settings_are_not(tmp_path, changes):
    prefix = write_documents(tmp_path / "a", some_documents())
    what = {"split": "8,2,0", "num_train": 30, "num_valid": 4}
    build_index(spec(prefix, **what), tiny_tokenizer())
    before = sorted(tmp_path.rglob("*"))
    train, _ = build_text(spec(prefix, **what | changes), tiny_tokenizer())
    assert len(train[0]["tokens"]) == changes.get("seq_length", 8)
    assert sorted(tmp_path.rglob("*")) == before


def test_indices_of_files_that_were_written_again_are_not(tmp_path):
    prefix = write_documents(tmp_path / "a", [[10] * 20, [11] * 20])
    build_index(spec(prefix), tiny_tokenizer())
    write_documents(tmp_path / "a", [[20] * 9, [21] * 9, [22] * 9, [23] * 9])
    train, _ = build_text(spec(prefix), tiny_tokenizer())
    assert seen(train, 8) == {20, 21, 22, 23}
    # Files of the same sizes, too.
    write_documents(tmp_path / "a", [[30] * 5, [31] * 13, [32] * 9, [33] * 9])
    fresh = build_index(spec(prefix), tiny_tokenizer())
    write_documents(tmp_path / "a", [[30] * 13, [31] * 5, [32] * 9, [33] * 9])
    assert build_index(spec(prefix), tiny_tokenizer()) != fresh


# --- blends ---


@pytest.mark.parametrize("kind", [TEXT, ANSWERS], ids=lambda kind: kind.command)
def test_weights_are_shares_of_the_samples(kind, tmp_path):
    prefixes = blend_of(kind, tmp_path, sizes=(10, 10))
    train, _ = build_samples(
        kind, spec(*prefixes, weights=(3.0, 1.0), num_train=80), tiny_tokenizer()
    )
    assert len(train) >= 80
    assert Counter(origin(train[index]) for index in range(80)) == {10: 60, 20: 20}
    # The shares hold from the start on, not only over the whole.
    assert Counter(origin(train[index]) for index in range(8)) == {10: 6, 20: 2}


@pytest.mark.parametrize("kind", [TEXT, ANSWERS], ids=lambda kind: kind.command)
def test_without_weights_the_sizes_are_the_shares_for_as_long_as_it_takes(kind, tmp_path):
    prefixes = blend_of(kind, tmp_path, sizes=(30, 10))
    train, _ = build_samples(kind, spec(*prefixes, num_train=400), tiny_tokenizer())
    assert len(train) >= 400
    assert Counter(origin(train[index]) for index in range(400)) == {10: 300, 20: 100}


@pytest.mark.parametrize("kind", [TEXT, ANSWERS], ids=lambda kind: kind.command)
def test_one_weighted_part_is_the_part_alone(kind, tmp_path):
    prefix = blend_of(kind, tmp_path, sizes=(10, 10))[0]
    train, _ = build_samples(kind, spec(prefix, weights=(0.3,), num_train=50), tiny_tokenizer())
    assert {origin(train[index]) for index in range(50)} == {10}


@pytest.mark.parametrize("kind", [TEXT, ANSWERS], ids=lambda kind: kind.command)
def test_what_each_part_has_given_is_counted_without_reading_it(kind, tmp_path):
    prefixes = blend_of(kind, tmp_path, sizes=(30, 10))
    train, _ = build_samples(
        kind, spec(*prefixes, weights=(2.0, 5.0), num_train=80), tiny_tokenizer()
    )
    longer, _ = build_samples(
        kind, spec(*prefixes, weights=(2.0, 5.0), num_train=200), tiny_tokenizer()
    )
    for consumed in (0, 1, 7, 80):
        counted = Counter(origin(train[index]) for index in range(consumed))
        assert consumed_by_part(train, 2, consumed) == [counted[10], counted[20]]
        # A run that is made longer has read the same.
        assert consumed_by_part(longer, 2, consumed) == [counted[10], counted[20]]
    assert consumed_by_part(train, 1, 17) == [17]


def blend_of(kind: DataKind, folder: Path, sizes: tuple[int, int]) -> list[str]:
    """Two data sets of equally long documents whose tokens are all 10, or all 20."""
    prefixes = []
    for token, size in zip((10, 20), sizes, strict=True):
        prefix = folder / str(token)
        if kind == TEXT:
            prefixes.append(write_documents(prefix, [[token] * 8] * size))
        else:
            prefixes.append(write_instructions(prefix, [([token] * 4, [token] * 5)] * size))
    return prefixes


def origin(sample: dict[str, np.ndarray]) -> int:
    """Which of the two data sets a sample is of."""
    (token,) = {int(token) for token in sample["tokens"]}
    return token


# --- damaged files ---


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no index" * 20,
        lambda data: data[:40],
        lambda data: data[:-9],
    ],
    ids=["empty", "other content", "cut in the lengths", "cut at the end"],
)
@pytest.mark.parametrize("kind", [TEXT, ANSWERS], ids=lambda kind: kind.command)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_index_is_told(damage, kind, tmp_path):
    prefix = blend_of(kind, tmp_path, sizes=(10, 10))[0]
    file = next(tmp_path.glob("10*input_ids*.idx" if kind == ANSWERS else "10.idx"))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError) as caught:
        build_samples(kind, spec(prefix), tiny_tokenizer())
    assert f"{file} is damaged" in caught.value.message
    assert caught.value.hint == "run `glm3 preprocess` again"
    del caught
    gc.collect()  # megatron's half-open file complains when it goes


@pytest.mark.parametrize("kind", [TEXT, ANSWERS], ids=lambda kind: kind.command)
def test_tokens_that_are_cut_off_are_told(kind, tmp_path):
    prefix = blend_of(kind, tmp_path, sizes=(10, 10))[0]
    file = next(tmp_path.glob("10*input_ids*.bin" if kind == ANSWERS else "10.bin"))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError) as caught:
        build_samples(kind, spec(prefix), tiny_tokenizer())
    assert f"{file} is damaged" in caught.value.message


def test_a_data_set_without_a_document_is_told(tmp_path):
    with pytest.raises(DataError, match="holds no token"):
        build_text(spec(write_documents(tmp_path / "a", [])), tiny_tokenizer())
