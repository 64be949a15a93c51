"""The kinds of training data: their files, their preprocessing, and how they are counted."""

import pickle
from pathlib import Path

import pytest

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.kinds import (
    ANSWERS,
    FEEDBACK,
    INSTRUCTION_KEYS,
    KINDS,
    PAIRS,
    TEXT,
    instruction_file,
    kind_of,
)
from tests.support.preprocess_runs import run, write_lines
from tests.support.tiny_tokenizer import tiny_tokenizer_folder


def test_files_of_a_prefix():
    assert TEXT.file_names("a") == ["a"]
    assert ANSWERS.file_names("a") == [instruction_file("a", key) for key in INSTRUCTION_KEYS]
    assert (TEXT.main_file("a"), ANSWERS.main_file("a")) == ("a", "a_packed_input_ids_document")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.handler)
def test_preprocess_writes_the_files_that_the_kind_names(kind, tmp_path):
    row = {"text": "the quick brown fox", "instruction": "the quick", "output": "brown fox"}
    row |= {"chosen": "brown fox", "rejected": "lazy dog", "label": True}
    source = write_lines(tmp_path / "in.jsonl", [row])
    run(source, tmp_path / "out", **kind.preprocess_settings(seq_length=32))
    names = kind.file_names(kind.data_prefix(str(tmp_path / "out")))
    assert {f"{name}.idx" for name in names} == {str(path) for path in tmp_path.glob("*.idx")}


def test_each_method_has_its_kind():
    found = {method: kind_of(method) for method in ("sft", "dpo", "orpo", "simpo", "kto")}
    expected = {"sft": ANSWERS, "dpo": PAIRS, "orpo": PAIRS, "simpo": PAIRS, "kto": FEEDBACK}
    assert found == expected
    assert (TEXT.usage, ANSWERS.usage) == ("pretrain", "finetune")
    assert PAIRS.usage == "finetune --method dpo|orpo|simpo"


def test_only_answers_are_cut_by_preprocess():
    config = {"tokenizer": tiny_tokenizer_folder(), "output_prefix": Path("out")}
    text, answers = (
        PreprocessConfig.parse(config | {"input": [Path("a.jsonl")]} | kind.preprocess_settings(32))
        for kind in (TEXT, ANSWERS)
    )
    assert (text.append_eod, text.seq_length) == (True, None)
    assert (answers.conversation_template, answers.seq_length) == ("chatglm3", 32)


def test_texts_count_by_tokens_and_answers_by_documents():
    sizes = {"samples": 10, "tokens": 400}
    assert (TEXT.default_weight(**sizes), ANSWERS.default_weight(**sizes)) == (400, 10)
    assert TEXT.epochs(samples=50, seq_length=16, size=400) == 50 * 16 / 400
    assert ANSWERS.epochs(samples=50, seq_length=16, size=10) == 50 / 10


def test_a_kind_is_the_same_in_another_process():
    for kind in KINDS:
        assert {kind: 1}[pickle.loads(pickle.dumps(kind))] == 1
