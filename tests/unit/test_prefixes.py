"""`--data`: weights, prefixes, and the files behind them."""

from pathlib import Path

import pytest

from glm3cli.data.kinds import (
    ANSWERS,
    FEEDBACK,
    INSTRUCTION_KEYS,
    PAIRS,
    TEXT,
    instruction_file,
)
from glm3cli.data.prefixes import Blend, parse_blend, read_blend
from glm3cli.errors import ConfigError, DataError


@pytest.fixture
def text(tmp_path):
    """Makes the (empty) files of text data sets."""

    def make(*names: str) -> list[str]:
        for name in names:
            for suffix in (".bin", ".idx"):
                (tmp_path / f"{name}{suffix}").touch()
        return [str(tmp_path / name) for name in names]

    return make


def packed(prefix: Path) -> str:
    for key in INSTRUCTION_KEYS:
        for suffix in (".bin", ".idx"):
            Path(instruction_file(str(prefix), key) + suffix).touch()
    return str(prefix)


def test_prefixes_without_weights_are_weighted_by_their_sizes(text):
    a, b = text("a", "b")
    assert parse_blend([a, b], TEXT) == Blend((a, b), None)


def test_weights_stand_before_a_colon(text):
    a, b = text("a", "b:c")
    assert parse_blend([f"0.3:{a}", f"2:{b}"], TEXT) == Blend((a, b), (0.3, 2.0))


def test_a_colon_after_anything_else_belongs_to_the_path(text, tmp_path, monkeypatch):
    text("x:a")
    monkeypatch.chdir(tmp_path)
    assert parse_blend(["x:a"], TEXT) == Blend(("x:a",), None)


@pytest.mark.parametrize("item", ["1:b.jsonl", "2.5:folder", "3:prefix"])
def test_what_looks_like_a_weight_belongs_to_a_file_that_is_there(
    text, tmp_path, monkeypatch, item
):
    monkeypatch.chdir(tmp_path)
    assert read_blend([item]).weights is not None
    if item == "3:prefix":
        text("3:prefix")
    elif item == "2.5:folder":
        Path(item).mkdir()
    else:
        Path(item).touch()
    assert read_blend([item]) == Blend((item,), None)
    assert read_blend([f"7:{item}"]) == Blend((item,), (7.0,))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/data.yaml").write_text(f"- {item}\n- ./x\n")
    with pytest.raises(ConfigError, match="some have a weight"):
        read_blend(["lists/data.yaml"])
    for file in tmp_path.glob(f"{item}*"):
        file.rename(tmp_path / "lists" / file.name)
    assert read_blend(["lists/data.yaml"]) == Blend((f"lists/{item}", "lists/x"), None)


def test_a_part_that_weighs_nothing_is_left_out_but_not_all_may(text):
    a, b = text("a", "b")
    assert parse_blend([f"0:{a}", f"1:{b}"], TEXT) == Blend((b,), (1.0,))
    with pytest.raises(ConfigError, match="all weights are 0"):
        parse_blend([f"0:{a}", f"0.0:{b}"], TEXT)
    with pytest.raises(ConfigError, match="all weights are 0"):
        parse_blend([f"0:{a}"], TEXT)


def test_weights_for_some_only_are_refused(text):
    a, b = text("a", "b")
    with pytest.raises(ConfigError) as caught:
        parse_blend([f"0.5:{a}", b], TEXT)
    assert "some have a weight and some don't" in caught.value.message
    assert "for each, or for none" in caught.value.hint


def test_instructions_are_six_files(tmp_path):
    prefix = packed(tmp_path / "alpaca")
    assert parse_blend([prefix], ANSWERS) == Blend((prefix,), None)
    missing = tmp_path / "alpaca_packed_labels_document.idx"
    missing.unlink()
    with pytest.raises(DataError) as caught:
        parse_blend([prefix], ANSWERS)
    assert caught.value.message == f"--data {prefix}: {missing} does not exist"


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(suffix, text, tmp_path):
    (a,) = text("a")
    (tmp_path / f"a{suffix}").unlink()
    with pytest.raises(DataError, match=rf"a\{suffix} does not exist"):
        parse_blend([a], TEXT)


def test_a_prefix_without_its_ending_is_led_to_the_files(text, tmp_path):
    (document,) = text("wiki_text_document")
    with pytest.raises(DataError) as caught:
        parse_blend([str(tmp_path / "wiki")], TEXT)
    assert caught.value.hint == f"these are there: pretrain --data {document}"


def test_data_of_the_other_kind_is_led_to_its_command(text, tmp_path):
    prefix = packed(tmp_path / "alpaca")
    with pytest.raises(DataError) as caught:
        parse_blend([prefix], TEXT)
    assert caught.value.hint == f"these are there: finetune --data {prefix}"
    (document,) = text("wiki_text_document")
    with pytest.raises(DataError) as caught:
        parse_blend([document], ANSWERS)
    assert caught.value.hint == f"these are there: pretrain --data {document}"


def test_preferences_are_led_to_their_methods(tmp_path):
    prefix = str(tmp_path / "likes")
    for key in INSTRUCTION_KEYS:
        for suffix in (".bin", ".idx"):
            Path(PAIRS.key_file(prefix, key) + suffix).touch()
    assert parse_blend([prefix], PAIRS) == Blend((prefix,), None)
    for kind in (ANSWERS, FEEDBACK):
        with pytest.raises(DataError) as caught:
            parse_blend([prefix], kind)
        way = f"finetune --method dpo|orpo|simpo --data {prefix}"
        assert caught.value.hint == f"these are there: {way}"


def test_without_any_such_file_preprocess_is_the_way_out(tmp_path):
    for prefix in (tmp_path / "nothing", tmp_path / "no" / "folder"):
        with pytest.raises(DataError) as caught:
            parse_blend([str(prefix)], TEXT)
        assert "glm3 preprocess" in caught.value.hint


def test_a_single_file_of_instructions_is_no_text(tmp_path):
    prefix = packed(tmp_path / "alpaca")
    with pytest.raises(DataError, match="whose questions pretrain would learn, too") as caught:
        parse_blend([f"{prefix}_packed_input_ids_document"], TEXT)
    assert caught.value.hint == f"use finetune --data {prefix}"
