"""Micro-batches of samples whose lengths differ, and the order that brings lengths together."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glm3cli.data.prefixes import Blend
from glm3cli.data.samples.instructions import build_instruction
from glm3cli.data.samples.loader import Loader, StepSize
from glm3cli.data.samples.padding import Padding
from glm3cli.data.samples.spec import Dataset, DataSpec
from tests.support.samples import write_instructions
from tests.support.tiny_tokenizer import tiny_tokenizer

SEQ_LENGTH = 32
SEED = 5


def document(size: int, first: int = 3) -> tuple[list[int], list[int]]:
    """A document of `size` positions whose tokens tell how long it is."""
    return [first], [100 + size] * size


def samples(prefix: str | tuple[str, ...], **changes: Any) -> Dataset:
    prefixes = (prefix,) if isinstance(prefix, str) else prefix
    values: dict[str, Any] = {"num_train": 8, "num_valid": 0, **changes}
    spec = DataSpec(Blend(prefixes, None), "1,0,0", SEQ_LENGTH, SEED, **values)
    return build_instruction(spec, tiny_tokenizer())[0]


def loader(dataset: Dataset, padding: Padding, **changes: Any) -> Loader:
    values: dict[str, Any] = {
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "dp_rank": 0,
        "dp_size": 1,
        "vocab_size": 500,
        "device": torch.device("cpu"),
        **changes,
    }
    return Loader(dataset, SEQ_LENGTH, **values, padding=padding)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    sizes = [3, 5, 9, 30, 4, 11, 40, 6]
    return write_instructions(tmp_path / "a", [document(size) for size in sizes])


def sizes_read(dataset: Dataset, indices: range) -> list[int]:
    return [len(dataset[index]["tokens"]) for index in indices]


def test_sizes_are_known_without_reading(prefix: str) -> None:
    for dataset in (samples(prefix), samples(prefix, packing=True), samples(prefix, group_size=2)):
        known = dataset.sizes(range(20))  # type: ignore[attr-defined]
        assert known.tolist() == sizes_read(dataset, range(20))
        assert known.max() == SEQ_LENGTH  # the sample of 40 is cut
        assert not len(dataset.sizes(range(0)))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("multiple", "sizes", "length"),
    [
        (None, [3, 5], 32),
        (1, [3, 5], 5),
        (4, [3, 5], 8),
        (4, [8, 5], 8),
        (12, [30, 5], 32),  # never longer than a sequence can be
        (4, [0, 0], 4),
    ],
)
def test_a_micro_batch_is_as_long_as_its_longest_sample(multiple, sizes, length) -> None:
    assert Padding(multiple).length(sizes, SEQ_LENGTH) == length


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_one_side_and_is_not_trained(prefix: str, side: Any) -> None:
    dataset = samples(prefix)
    for start in range(0, 8, 4):
        for number, batch in enumerate(loader(dataset, Padding(4, side)).microbatches(start)):
            pair = [dataset[start + 2 * number + row] for row in range(2)]
            assert batch.tokens.size(1) == Padding(4).length(
                [len(sample["tokens"]) for sample in pair], SEQ_LENGTH
            )
            for row, sample in enumerate(pair):
                size, length = len(sample["tokens"]), batch.tokens.size(1)
                real = slice(length - size, length) if side == "left" else slice(0, size)
                for key in ("tokens", "labels", "loss_mask"):
                    values = getattr(batch, key)[row]
                    assert values[real].tolist() == sample[key].tolist()
                    assert values.count_nonzero() == np.count_nonzero(sample[key])
            # On the right causal attention doesn't see the padding; on the left it has to be told.
            is_padded = any(len(sample["tokens"]) < batch.tokens.size(1) for sample in pair)
            assert (batch.segment_ids is not None) == (side == "left" and is_padded)
            if batch.segment_ids is not None:
                assert (batch.segment_ids > 0).sum(1).tolist() == [
                    len(sample["tokens"]) for sample in pair
                ]


def test_all_ranks_know_the_lengths_and_the_size_of_a_step(prefix: str) -> None:
    dataset = samples(prefix)
    ranks = [
        loader(dataset, Padding(4), dp_rank=rank, dp_size=2, global_batch_size=8)
        for rank in range(2)
    ]
    batches = [batch for one in ranks for batch in one.microbatches(0)]
    lengths = [one.lengths(0) for one in ranks]
    assert [*lengths[0], *lengths[1]] == [batch.tokens.size(1) for batch in batches]
    assert lengths[0] != lengths[1]
    expected = StepSize(
        tokens=sum(batch.tokens.numel() for batch in batches),
        unpadded=3 + 5 + 9 + 30 + 4 + 11 + SEQ_LENGTH + 6,
        squares=sum(2 * batch.tokens.size(1) ** 2 for batch in batches),
    )
    assert [one.step_size(0) for one in ranks] == [expected, expected]
    full = loader(dataset, Padding(), global_batch_size=8)
    assert full.step_size(0) == replace(expected, tokens=8 * 32, squares=8 * 32**2)


def test_packs_hold_every_sample_once_an_epoch(prefix: str) -> None:
    dataset = samples(prefix, packing=True)
    seen: list[int] = []
    for index in range(len(dataset)):
        pack = dataset[index]
        assert len(pack["tokens"]) <= SEQ_LENGTH
        for number in range(1, int(pack["segment_ids"].max()) + 1):
            tokens = pack["tokens"][pack["segment_ids"] == number]
            labels = pack["labels"][pack["segment_ids"] == number]
            assert tokens[0] == 3  # a whole sample, which predicts nothing of the next one
            assert set(labels) == {labels[0]}
            seen.append(int(labels[0]) - 100)
    assert sorted(seen) == [3, 4, 5, 6, 9, 11, 30, 40]
    assert len(dataset) == 4  # 32, 30, and 38 positions that two packs share


def test_packs_of_preprocess_can_be_packed_again(tmp_path: Path) -> None:
    from glm3cli.data.kinds import instruction_file
    from tests.support.samples import write_documents

    prefix = str(tmp_path / "packed")
    for key, numbers in {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]}.items():
        write_documents(instruction_file(prefix, key), [numbers] * 2)
    write_documents(instruction_file(prefix, "attention_mask"), [[1, 1, 2, 2]] * 2)
    [pack] = [samples(prefix, packing=True)[0]]
    assert pack["segment_ids"].tolist() == [1, 1, 2, 3, 3, 4]


# --- group by length ---


@pytest.fixture
def many(tmp_path: Path) -> tuple[str, str]:
    random = np.random.default_rng(0)
    return tuple(
        write_instructions(
            tmp_path / name, [document(int(size)) for size in random.integers(1, 31, 300)]
        )
        for name in ("b", "c")
    )  # type: ignore[return-value]


@pytest.mark.parametrize("blended", [False, True])
def test_steps_have_similar_lengths_and_the_first_the_longest(many, blended: bool) -> None:
    prefixes = many if blended else many[:1]
    dataset = samples(prefixes, group_size=4, num_train=600)
    steps = np.array(sizes_read(dataset, range(600))).reshape(-1, 4)
    assert (steps[0] == 30).all()
    assert (np.ptp(steps, axis=1) <= 2).mean() > 0.9
    assert (np.diff(steps, axis=1) <= 0).all()
    # The steps themselves come in no order.
    assert np.abs(np.diff(steps[1:64, 0])).mean() > 3


@pytest.mark.parametrize("blended", [False, True])
def test_every_sample_is_read_as_often_as_without_grouping(many, blended: bool) -> None:
    prefixes = many if blended else many[:1]
    window = 64 * 4
    plain = samples(prefixes, num_train=3 * window)
    grouped = samples(prefixes, group_size=4, num_train=3 * window)
    count = 600 if blended else 300  # an epoch; grouping moves the longest within the first one
    ours, theirs = (sorted(sizes_read(one, range(count))) for one in (grouped, plain))
    if not blended:
        assert len(ours) == len(theirs)
    assert sum(ours) == pytest.approx(sum(theirs), rel=0.05)


def test_the_order_does_not_depend_on_the_length_of_the_run(many) -> None:
    short, long = (samples(many, group_size=4, num_train=count) for count in (40, 2000))
    assert sizes_read(short, range(40)) == sizes_read(long, range(40))


def test_a_grouped_blend_knows_where_its_samples_come_from(many) -> None:
    dataset = samples(many, group_size=4, num_train=256)
    index = dataset.dataset_index  # type: ignore[attr-defined]
    assert np.bincount(index[:256]).tolist() == [128, 128]
    named = loader(dataset, Padding(4), sources=("b", "c"))
    for consumed in (40, 8, 200):  # also of a run that went back
        found = named.consumed_by_source(consumed)
        assert sum(part["samples"] for part in found.values()) == consumed
        for number, part in enumerate(found.values()):
            chosen = np.flatnonzero(index[:consumed] == number)
            assert part["tokens"] == sum(len(dataset[int(one)]["tokens"]) for one in chosen)
