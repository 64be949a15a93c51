"""What a tuning shows of its samples before it begins, and what it warns of."""

import json
from pathlib import Path
from typing import Any

import pytest

from glm3cli.data.kinds import ANSWERS, instruction_file
from glm3cli.data.prefixes import Blend
from glm3cli.data.samples.first_look import FirstLook
from glm3cli.data.samples.weighting import Weighting
from glm3cli.data.tokens.chat import build_sample
from glm3cli.data.tokens.messages import Message
from glm3cli.errors import DataError
from tests.support.samples import write_documents, write_instructions
from tests.support.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
START, EOS = list(TOKENIZER.prefix), TOKENIZER.eos_id


def look(prefix: Any, *, seq_length: int = 64, preview: int = 0, **changes: Any) -> list[str]:
    first = FirstLook(ANSWERS, "1,0,0", seq_length, TOKENIZER, Weighting(**changes), preview)
    return list(first.lines(Blend((str(prefix),), None)))


def warnings(lines: list[str]) -> list[str]:
    return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]


def write_chats(prefix: Path, answers: list[str]) -> Path:
    """Writes conversations of one turn as preprocess does."""
    made = [
        build_sample(TOKENIZER, [Message("user", "the dog"), Message("assistant", answer)])
        for answer in answers
    ]
    columns = {
        "input_ids": [sample.input_ids for sample in made],
        "labels": [sample.labels for sample in made],
        "attention_mask": [[1] * len(sample.input_ids) for sample in made],
    }
    for key, sequences in columns.items():
        write_documents(instruction_file(str(prefix), key), sequences)
    return prefix


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats", ["a fox", "the quick brown fox", "seven wizards"])


def test_a_sample_is_shown_by_what_is_trained(chats: Path) -> None:
    lines = look(chats, preview=1)
    assert lines[0] == f"sample 1 of {chats}: document 0"
    hidden, trained = lines[1:3]
    assert hidden.split()[:3] == ["-", f"{START[0]}:[gMASK]", f"{START[1]}:sop"]
    assert hidden.endswith(f" {TOKENIZER.special('<|assistant|>')}:<|assistant|>")
    assert trained.split()[0] == "trained"
    assert trained.endswith(f" {EOS}:</s>")
    words = [TOKENIZER.token_name(one) for one in TOKENIZER.encode("a fox")]
    assert [word.split(":", 1)[1] for word in trained.split()[-len(words) - 1 : -1]] == words


def test_good_data_has_no_warning(chats: Path) -> None:
    [line] = look(chats)
    assert "0.0% of the samples are cut" in line
    lengths = sorted(
        len(
            build_sample(TOKENIZER, [Message("user", "the dog"), Message("assistant", a)]).input_ids
        )
        for a in ("a fox", "the quick brown fox", "seven wizards")
    )
    assert f"samples of {lengths[0]} to {lengths[-1]} tokens" in line
    assert f"half of them up to {lengths[1]}," in line


def test_a_long_run_is_shown_by_both_its_ends(tmp_path: Path) -> None:
    prefix = write_instructions(tmp_path / "a", [([*START, *range(10, 90)], [7, EOS])])
    lines = look(prefix, seq_length=100, preview=1)
    assert " ... 42 more ... " in lines[1]
    assert len(lines[1].split()) == 1 + 40 + 4


def test_last_turns_alone_are_counted_as_trained(tmp_path: Path) -> None:
    turns = [Message("user", "a"), Message("assistant", "b"), *[Message("user", "c")] * 1]
    sample = build_sample(TOKENIZER, [*turns, Message("assistant", "d")])
    for key, values in {
        "input_ids": sample.input_ids,
        "labels": sample.labels,
        "attention_mask": [1] * len(sample.input_ids),
    }.items():
        write_documents(instruction_file(str(tmp_path / "a"), key), [values])
    both, last = (
        sum(line.split()[0] == "trained" for line in look(tmp_path / "a", preview=1, **changes))
        for changes in ({}, {"last_turn_only": True})
    )
    assert (both, last) == (2, 1)


def test_answers_that_never_end(tmp_path: Path) -> None:
    prefix = write_instructions(tmp_path / "a", [([*START, 5], [6, 7]), ([*START, 5], [8, 9])])
    [warning] = warnings(look(prefix))
    assert "no sample ends with a trained end token" in warning


def test_equal_answers(tmp_path: Path) -> None:
    [warning] = warnings(look(write_chats(tmp_path / "a", ["a fox"] * 3)))
    assert warning.endswith("all samples that were looked at train the same tokens")


def test_samples_that_lose_their_ends(chats: Path) -> None:
    found = warnings(look(chats, seq_length=10))
    assert any("of the samples lose their ends; give a larger --seq-length" in w for w in found)


def test_files_that_another_tokenizer_has_made(chats: Path, tmp_path: Path) -> None:
    stats = Path(f"{chats}.stats.json")
    stats.write_text(json.dumps({"job": {"tokenizer": TOKENIZER.sha256}}))
    assert not warnings(look(chats))
    stats.write_text(json.dumps({"job": {"tokenizer": "0" * 64}}))
    [warning] = warnings(look(chats))
    assert "another tokenizer.model than" in warning
    strange = write_instructions(
        tmp_path / "strange", [([3, 4], [5, EOS]), ([*START, 4], [6, EOS])]
    )
    [warning] = warnings(look(strange))
    assert "1 of 2 samples don't begin with [gMASK] sop" in warning
    beyond = write_instructions(tmp_path / "beyond", [([*START, 64795], [5, EOS])])
    with pytest.raises(DataError, match="another tokenizer has made the files") as caught:
        look(beyond)
    assert "has token id 64795" in caught.value.message


def test_packs_whose_samples_cannot_be_told_apart(tmp_path: Path) -> None:
    pack = [*START, 5, 6, EOS, *START, 7, 8, EOS]
    for key, values in {"input_ids": pack, "labels": pack}.items():
        write_documents(instruction_file(str(tmp_path / "a"), key), [values])
    mask = instruction_file(str(tmp_path / "a"), "attention_mask")
    write_documents(mask, [[1] * 5 + [2] * 5])
    look(tmp_path / "a")
    write_documents(mask, [[1] * 10])
    with pytest.raises(DataError, match="its attention_mask doesn't tell them apart"):
        look(tmp_path / "a")
