"""The tokenizer against the original's ids and decodings, and stream decoding by property."""

import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm3cli.config.family.members import CHATGLM3
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError
from tests.support.shared import GOLDEN, SHARED, needs_shared
from tests.support.tiny_tokenizer import tiny_tokenizer, tiny_tokenizer_folder

CASES = (
    json.loads((GOLDEN / "tokenizer.json").read_text("utf-8"))["cases"] if GOLDEN.is_dir() else []
)
AWKWARD = [" ", "  ", "   ", "▁", "a", "the", " the", "\n", "\t", "你", "好", "é", "😀", "23", "."]
AWKWARD += ["\r", "\0", "\u3000", "\u200d", "<s>", "</s>", "<0x0A>", "[gMASK]", "<|user|>"]
texts = st.one_of(
    st.text(max_size=40), st.lists(st.sampled_from(AWKWARD), max_size=12).map("".join)
)


@pytest.fixture(scope="module")
def chatglm() -> Tokenizer:
    return Tokenizer.load(SHARED / "chatglm3-6b")


@needs_shared
@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["text"])[:30])
def test_ids_and_decodings_are_the_original_ones(chatglm, case):
    assert chatglm.encode(case["text"]) == case["sp_encode"]
    ids = [*chatglm.prefix, *chatglm.encode(case["text"])]
    assert ids == case["input_ids"]
    assert chatglm.decode(ids, skip_special=False) == case["decode"]
    # The original skips no special token even when asked to; ours leaves the text alone.
    assert case["decode_skip_special"] == case["decode"]
    assert chatglm.decode(ids) == case["text"].replace("▁", " ")


@needs_shared
def test_special_tokens_have_the_original_ids(chatglm):
    facts = json.loads((GOLDEN / "tokenizer.json").read_text("utf-8"))["facts"]
    assert {name: chatglm.special(name) for name in CHATGLM3.special} == facts["special_tokens"]
    assert chatglm.vocab_size == facts["vocab_size"]
    assert list(chatglm.prefix) == facts["prefix_tokens"]
    assert (chatglm.eos_id, chatglm.pad_id) == (facts["eos_token_id"], facts["pad_token_id"])


@needs_shared
def test_streaming_a_conversation_equals_the_original_decoding(chatglm):
    chats = json.loads((GOLDEN / "tokenizer.json").read_text("utf-8"))["chat"]
    for chat in chats.values():
        decoder = chatglm.stream_decoder(skip_special=False)
        text = "".join(map(decoder.push, chat["input_ids"])) + decoder.finish()
        assert text == chat["hf_decode"]


@needs_shared
@settings(max_examples=200)
@given(ids=st.lists(st.integers(3, 64788), max_size=12))
def test_decoding_equals_sentencepiece(ids):
    tokenizer = Tokenizer.load(SHARED / "chatglm3-6b")
    assert tokenizer.decode(ids) == tokenizer.vocabulary.pieces.decode(ids)


@settings(max_examples=300)
@given(ids=st.lists(st.integers(3, 300), max_size=20))
def test_decoding_bytes_equals_sentencepiece(ids):
    """Most of these ids are single bytes, and most of their runs are no valid UTF-8."""
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(ids) == tokenizer.vocabulary.pieces.decode(ids)


@settings(max_examples=300)
@given(text=texts)
def test_a_stream_never_shows_half_a_character_and_adds_up(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text)
    decoder = tokenizer.stream_decoder()
    parts = [decoder.push(token) for token in ids]
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in text
    assert "".join(parts) + decoder.finish() == tokenizer.decode(ids) == text.replace("▁", " ")


def test_a_character_of_four_bytes_comes_whole():
    tokenizer = tiny_tokenizer()
    decoder = tokenizer.stream_decoder()
    ids = tokenizer.encode("😀")
    assert [decoder.push(token) for token in ids] == ["", "", "", "", "😀"]


def test_an_unfinished_character_shows_at_the_end():
    tokenizer = tiny_tokenizer()
    decoder = tokenizer.stream_decoder()
    assert [decoder.push(token) for token in tokenizer.encode("😀")[:3]] == [""] * 3
    assert decoder.finish() == "\ufffd\ufffd"


def test_ids_beyond_the_vocabulary_have_no_text():
    """The model's output is wider than the vocabulary, so such ids can come."""
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer.encode("the fox"), tokenizer.vocab_size, tokenizer.vocab_size + 99]
    assert tokenizer.decode(ids, skip_special=False) == "the fox"


def test_text_that_looks_special_stays_text():
    tokenizer = tiny_tokenizer()
    for name in (*CHATGLM3.special, "</s>", "<unk>", "<0x0A>"):
        ids = tokenizer.encode(name)
        assert not any(tokenizer.is_special(token) for token in ids)
        assert tokenizer.decode(ids) == name


def test_special_tokens_follow_a_vocabulary_of_any_size():
    tokenizer = tiny_tokenizer()
    size = tokenizer.vocabulary.pieces.get_piece_size()
    assert [tokenizer.special(name) for name in CHATGLM3.special] == list(range(size, size + 9))
    assert tokenizer.vocab_size == size + 9


def test_half_a_surrogate_pair_is_an_unknown_character():
    tokenizer = tiny_tokenizer()
    assert tokenizer.encode("a \ud800 b") == tokenizer.encode("a \ufffd b")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_a_pickled_tokenizer_is_the_same():
    tokenizer = tiny_tokenizer()
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("the fox 你好") == tokenizer.encode("the fox 你好")


def test_megatron_finds_what_it_asks_for():
    tokenizer = tiny_tokenizer()
    assert (tokenizer.eod, tokenizer.pad) == (2, 0)
    assert json.dumps(tokenizer.unique_identifiers)


def test_loading_does_not_import_torch():
    code = "import sys, glm3cli.data.tokens.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_tokenizer_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 5000])
def test_a_damaged_tokenizer_is_a_sentence(tmp_path, keep):
    whole = (tiny_tokenizer_folder() / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[: min(keep, len(whole) - 7)])
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer.load(tmp_path)
