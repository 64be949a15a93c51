"""Samples of pairs and of feedback: their segments, references, and mismatched answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm3cli.data.kinds import FEEDBACK, INSTRUCTION_KEYS, PAIRS, DataKind
from glm3cli.data.prefixes import Blend
from glm3cli.data.samples.datasets import build_samples
from glm3cli.data.samples.preferences import MismatchedSamples
from glm3cli.data.samples.references import References
from glm3cli.data.samples.spec import DataSpec
from glm3cli.errors import DataError
from tests.support.samples import write_documents
from tests.support.tiny_tokenizer import tiny_tokenizer

# Of each document, the segments: an id, a prompt, and an answer.
Documents = list[list[tuple[int, list[int], list[int]]]]
PAIR_DOCUMENTS: Documents = [
    [(1, [10 * n, 1], [10 * n + 5] * (n % 3 + 1)), (2, [10 * n, 1], [10 * n + 6] * (n % 2 + 1))]
    for n in range(1, 7)
]
FEEDBACK_DOCUMENTS: Documents = [
    [(1 + n % 2, [10 * n, 1, 2], [10 * n + 5] * (n % 4 + 1))] for n in range(1, 9)
]


def write(prefix: Path, kind: DataKind, documents: Documents) -> str:
    columns: dict[str, list[list[int]]] = {key: [] for key in INSTRUCTION_KEYS}
    for segments in documents:
        columns["input_ids"].append([i for _, ask, answer in segments for i in ask + answer])
        columns["labels"].append([i for _, ask, a in segments for i in [-100] * len(ask) + a])
        columns["attention_mask"].append([n for n, ask, a in segments for _ in ask + a])
    for key, values in columns.items():
        write_documents(kind.key_file(str(prefix), key), values)
    return str(prefix)


def samples(prefix: str, kind: DataKind, length: int = 64, **changes: Any) -> Any:
    spec = DataSpec(Blend((prefix,), None), "1,0,0", length, 1, 8, 0, **changes)
    return build_samples(kind, spec, tiny_tokenizer())[0]


def segments(sample: dict[str, np.ndarray]) -> Documents:
    """The segments of one sample, whose last token is its last label."""
    ids = [*sample["tokens"], sample["labels"][-1]]
    numbers = [*sample["segment_ids"], sample["segment_ids"][-1]]
    trained = [False, *(sample["loss_mask"] > 0)]
    found = []
    for number in dict.fromkeys(numbers):
        places = [i for i, n in enumerate(numbers) if n == number]
        prompt = [int(ids[i]) for i in places if not trained[i]]
        answer = [int(ids[i]) for i in places if trained[i]]
        found.append((int(number), prompt, answer))
    return [found]


def test_a_sample_has_true_labels_everywhere(tmp_path):
    dataset = samples(write(tmp_path / "a", PAIRS, PAIR_DOCUMENTS), PAIRS)
    found = []
    for index in range(len(PAIR_DOCUMENTS)):
        sample = dataset[index]
        np.testing.assert_array_equal(sample["labels"][:-1], sample["tokens"][1:])
        found += segments(sample)
    assert sorted(found) == PAIR_DOCUMENTS


@pytest.mark.parametrize(
    ("kind", "documents"), [(PAIRS, PAIR_DOCUMENTS), (FEEDBACK, FEEDBACK_DOCUMENTS)]
)
def test_packed_samples_keep_what_people_think(tmp_path, kind, documents):
    dataset = samples(write(tmp_path / "a", kind, documents), kind, length=24, packing=True)
    assert len(dataset) < len(documents)
    expected = {answer[0]: number % 2 for segments in documents for number, _, answer in segments}
    found = {}
    for index in range(len(dataset)):
        sample = dataset[index]
        for number in set(sample["segment_ids"].tolist()):
            trained = (sample["segment_ids"] == number) & (sample["loss_mask"] > 0)
            [answer] = set(sample["labels"][trained].tolist())
            found[answer] = number % 2
    assert found == expected


def test_every_answer_goes_to_one_other_prompt(tmp_path):
    dataset = samples(write(tmp_path / "a", FEEDBACK, FEEDBACK_DOCUMENTS), FEEDBACK)
    others = MismatchedSamples(dataset)
    answers = {answer[0]: answer for [(_, _, answer)] in FEEDBACK_DOCUMENTS}
    given = {}
    for index in range(len(FEEDBACK_DOCUMENTS)):
        [[(_, prompt, own)]] = segments(dataset[index])
        [[(_, same, other)]] = segments(others[index])
        assert prompt == same
        assert other == answers[other[0]] != own
        given[own[0]] = other[0]
        assert others.sizes([index]).tolist() == [len(others[index]["tokens"])]
    assert set(given.values()) == answers.keys()
    # In the first epoch each gets the answer that was read before it.
    order = [int(dataset[index]["labels"][-1]) for index in range(len(FEEDBACK_DOCUMENTS))]
    assert [given[answer] for answer in order[1:]] == order[:-1]


def test_mismatched_answers_of_a_pack_fit_into_a_row(tmp_path):
    prefix = write(tmp_path / "a", FEEDBACK, FEEDBACK_DOCUMENTS)
    dataset = samples(prefix, FEEDBACK, length=12, packing=True)
    others = MismatchedSamples(dataset)
    for index in range(len(dataset)):
        own, other = segments(dataset[index])[0], segments(others[index])[0]
        assert len(others[index]["tokens"]) <= 12
        assert {tuple(prompt) for _, prompt, _ in other} <= {tuple(prompt) for _, prompt, _ in own}
        assert [number for number, _, _ in other] == list(range(1, len(other) + 1))


def test_references_stand_at_the_first_trained_token(tmp_path):
    dataset = samples(write(tmp_path / "a", FEEDBACK, FEEDBACK_DOCUMENTS), FEEDBACK)
    table = References.unknown(len(FEEDBACK_DOCUMENTS))
    needed = [*table.missing(dataset, range(len(FEEDBACK_DOCUMENTS)), mismatched=True)]
    assert len(needed) == 2 * len(FEEDBACK_DOCUMENTS)
    for document, place in needed:
        number = FEEDBACK_DOCUMENTS[document][0][0]
        column = number - 1 if place is None else 0
        table.note((document, place), {column: -1.0 - document - (place is not None) / 2})
    assert not [*table.missing(dataset, range(len(FEEDBACK_DOCUMENTS)), mismatched=True)]
    table.write(tmp_path / "table.npz")
    References.read(tmp_path / "table.npz", len(FEEDBACK_DOCUMENTS)).attach(dataset)
    for index in range(len(FEEDBACK_DOCUMENTS)):
        [document] = dataset.pack(index)
        for sample, value in (
            (dataset[index], -1.0 - document),
            (MismatchedSamples(dataset)[index], -1.5 - document),
        ):
            first = int(np.argmax(sample["loss_mask"] > 0))
            expected = np.zeros(len(sample["tokens"]))
            expected[first] = value
            np.testing.assert_array_equal(sample["reference"], expected)


def test_files_of_references_that_do_not_fit_say_nothing(tmp_path):
    table = References.unknown(3)
    table.note((1, None), {0: -1.0})
    table.write(tmp_path / "table.npz")
    assert References.read(tmp_path / "table.npz", 3).num_known == 1
    table.note((2, None), {})  # has no trained token: isn't looked at again
    assert [*table.missing(None, [0, 1, 2], mismatched=False)] == [(0, None)]
    assert References.read(tmp_path / "table.npz", 4).num_known == 0
    assert References.read(tmp_path / "missing.npz", 3).num_known == 0
    (tmp_path / "table.npz").write_bytes(b"no archive")
    assert References.read(tmp_path / "table.npz", 3).num_known == 0


def test_a_pair_that_does_not_fit_is_refused(tmp_path):
    prefix = write(tmp_path / "a", PAIRS, PAIR_DOCUMENTS)
    with pytest.raises(DataError, match="1 of 6 samples are longer than the 7 tokens"):
        samples(prefix, PAIRS, length=7)
    samples(prefix, PAIRS, length=8)
