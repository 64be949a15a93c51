"""The micro-batches of a rank, at any position in the samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from glm3cli.data.samples.loader import Batch, Loader
from glm3cli.errors import DataError
from tests.support.tiny import Samples


class Numbered:
    """Sample i has the tokens i and the labels i + 1."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {
            "tokens": np.full(4, index),
            "labels": np.full(4, index + 1),
            "loss_mask": np.ones(4, dtype=np.float32),
        }


def loader(
    dataset=None, *, dp_rank=0, dp_size=1, micro=2, batch=8, vocab_size=5000, seq_length=4
) -> Loader:
    return Loader(
        dataset=Numbered() if dataset is None else dataset,
        seq_length=seq_length,
        micro_batch_size=micro,
        global_batch_size=batch,
        dp_rank=dp_rank,
        dp_size=dp_size,
        vocab_size=vocab_size,
        device=torch.device("cpu"),
    )


def test_a_source_that_is_named_twice_is_counted_once():
    class Blended(Numbered):
        dataset_index = np.array([0, 1, 2, 0, 1, 2])

    named = replace(loader(Blended()), sources=("a", "b", "a"))
    found = named.consumed_by_source(5)
    assert found == {"a": {"samples": 3, "tokens": 12}, "b": {"samples": 2, "tokens": 8}}


def numbers(batch: Batch) -> list[int]:
    return batch.tokens[:, 0].tolist()


def test_a_step_takes_the_next_global_batch_in_micro_batches():
    batches = list(loader().microbatches(16))
    assert [numbers(batch) for batch in batches] == [[16, 17], [18, 19], [20, 21], [22, 23]]


@pytest.mark.parametrize(
    ("dp_size", "micro"), [(1, 1), (1, 8), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)]
)
@pytest.mark.parametrize("consumed", [0, 8, 104])
def test_all_ranks_together_read_each_sample_of_the_step_once(dp_size, micro, consumed):
    ranks = [
        list(loader(dp_rank=rank, dp_size=dp_size, micro=micro).microbatches(consumed))
        for rank in range(dp_size)
    ]
    assert {len(batches) for batches in ranks} == {8 // (dp_size * micro)}
    read = [number for batches in ranks for batch in batches for number in numbers(batch)]
    assert sorted(read) == list(range(consumed, consumed + 8))


def test_the_same_micro_batch_is_read_at_the_same_time_whatever_the_number_of_ranks():
    alone = [numbers(batch) for batch in loader().microbatches(0)]
    shared = [list(loader(dp_rank=rank, dp_size=2).microbatches(0)) for rank in range(2)]
    assert [numbers(shared[i % 2][i // 2]) for i in range(4)] == alone


def test_a_batch_holds_its_samples_as_they_are():
    samples = Samples(6, 50)
    (batch, *_) = loader(samples, micro=2, seq_length=6).microbatches(4)
    for row, index in enumerate((4, 5)):
        for key in ("tokens", "labels", "loss_mask"):
            assert getattr(batch, key)[row].tolist() == samples[index][key].tolist()
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert batch.loss_mask.dtype == torch.float32


def test_only_what_is_asked_for_is_read():
    read = []

    class Noting(Numbered):
        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            read.append(index)
            return super().__getitem__(index)

    batches = loader(Noting()).microbatches(0)
    next(batches)
    assert read == [0, 1]


@pytest.mark.parametrize(("vocab_size", "token"), [(22, 22), (23, 24), (24, 24)])
def test_a_token_id_beyond_the_vocabulary_is_refused(vocab_size, token):
    # Samples 16 to 23 have labels up to 24; the largest of each micro-batch is 18, 20, 22, 24.
    with pytest.raises(DataError) as caught:
        list(loader(vocab_size=vocab_size).microbatches(16))
    assert f"has token id {token}, " in caught.value.message
    assert f"vocabulary has {vocab_size} entries" in caught.value.message
    assert "this model's tokenizer" in caught.value.hint


def test_the_last_id_of_the_vocabulary_is_fine():
    assert len(list(loader(vocab_size=25).microbatches(16))) == 4


@pytest.mark.parametrize(("cp_size", "trained"), [(1, 20), (2, 20), (2, 0), (1, 59)])
def test_only_places_that_are_trained_are_needed(cp_size: int, trained: int) -> None:
    """Two samples of 40 positions, whose last ones are trained."""

    class Answers:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            tokens, mask = np.arange(40), np.zeros(40, dtype=np.float32)
            mask[len(mask) - trained // 2 - trained % 2 * index :] = 0.5 if trained else 0
            return {"tokens": tokens, "labels": tokens, "loss_mask": mask}

    whole = loader(Answers(), batch=2, seq_length=40)
    for cp_rank in range(cp_size):
        [batch] = replace(whole, cp_rank=cp_rank, cp_size=cp_size).microbatches(0)
        assert batch.needed is not None
        chosen = torch.zeros(batch.tokens.numel())
        chosen[batch.needed] = 1
        assert batch.needed.tolist() == chosen.nonzero().flatten().tolist()  # each once, rising
        assert len(batch.needed) % 16 == 0
        assert len(batch.needed) - int(batch.loss_mask.count_nonzero()) <= 16
        left_out = chosen.view(-1, 2).T == 0
        assert not batch.loss_mask[left_out].any()
        [batch] = replace(whole, cp_rank=cp_rank, cp_size=cp_size, needs_all=True).microbatches(0)
        assert batch.needed is None


def test_all_places_are_needed_where_nearly_all_are_trained():
    assert next(iter(loader().microbatches(0))).needed is None
