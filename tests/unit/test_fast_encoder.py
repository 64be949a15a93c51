"""The fast encoder gives sentencepiece's ids, or leaves a text or a tokenizer to it."""

import builtins
import logging

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.data.tokens.vocabulary import fast_encoder
from glm3cli.data.tokens.vocabulary.fast_encoder import FastEncoder
from tests.support.awkward_texts import PARTS, awkward_texts
from tests.support.shared import SHARED, needs_shared
from tests.support.tiny_tokenizer import tiny_tokenizer, tiny_tokenizer_folder

TEXTS = 20_000


def both(folder):
    """The same tokenizer with and without the fast encoder."""
    plain, fast = Tokenizer.load(folder), Tokenizer.load(folder)
    fast.use_fast_encoder()
    assert fast.vocabulary._fast is not None
    return plain, fast


@pytest.fixture(scope="module")
def tiny():
    return both(tiny_tokenizer_folder())


@pytest.fixture(scope="module")
def chatglm():
    return both(SHARED / "chatglm3-6b")


def pieces_of(tokenizer):
    return [
        tokenizer.vocabulary.pieces.id_to_piece(i)
        for i in range(tokenizer.vocabulary.pieces.get_piece_size())
    ]


def assert_same(pair, text):
    plain, fast = pair
    expected = plain.encode(text)
    assert fast.encode(text) == expected, repr(text)
    found = fast.encode_array(text)
    assert found.dtype.name == "int32"
    assert found.tolist() == expected


@settings(max_examples=1000)
@given(text=st.text(st.characters(), max_size=60) | st.lists(st.sampled_from(PARTS)).map("".join))
def test_any_text(tiny, text):
    assert_same(tiny, text)


@needs_shared
@settings(max_examples=1000)
@given(text=st.text(st.characters(), max_size=60) | st.lists(st.sampled_from(PARTS)).map("".join))
def test_any_text_in_the_real_vocabulary(chatglm, text):
    assert_same(chatglm, text)


@needs_shared
def test_awkward_texts(chatglm):
    for text in awkward_texts(pieces_of(chatglm[0]), TEXTS, seed=1):
        assert_same(chatglm, text)


@needs_shared
def test_real_texts(chatglm):
    for name in ("c4.jsonl", "wiki.txt", "alpaca_zh_1k.json", "toolcall_zh.json"):
        text = (SHARED / "data" / name).read_text("utf-8")
        assert_same(chatglm, text[:200_000])  # as one, line ends and all
        for line in text.splitlines()[:2000]:
            assert_same(chatglm, line)


def test_control_pieces_are_left_to_sentencepiece(tiny):
    _, fast = tiny
    assert fast.vocabulary._fast.encode("a </s> b") is None
    assert fast.vocabulary._fast.encode("a \ud800 b") is None
    assert fast.vocabulary._fast.encode("a < /s> b") is not None
    assert 2 not in fast.encode("a </s> b")
    assert_same(tiny, "a </s> b")


def test_a_renewed_memory_gives_the_same_ids(tiny, monkeypatch):
    monkeypatch.setattr(fast_encoder, "_CHARACTERS_BETWEEN_RENEWALS", 40)
    encoder = FastEncoder.of(tiny[0].vocabulary.pieces)
    for text in ["the quick brown fox", "你好 世界 北京", "over a lazy dog"] * 5:
        assert encoder.encode(text).tolist() == tiny[0].encode(text)


def trained(folder, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["new york is in new york state, ok"] * 50),
        model_prefix=str(folder / "tokenizer"),
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return Tokenizer.load(folder)


OTHERS = {
    "unigram": {"model_type": "unigram", "vocab_size": 300, "byte_fallback": True},
    "no bytes": {"model_type": "bpe", "vocab_size": 40},
    "words of its own": {
        "model_type": "bpe",
        "vocab_size": 300,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["\u2581york"],
    },
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_a_model_of_another_kind_is_left_to_sentencepiece(tmp_path, caplog, options):
    tokenizer = trained(tmp_path, **options)
    before = tokenizer.encode("new york is in")
    with caplog.at_level(logging.INFO):
        tokenizer.use_fast_encoder()
    assert tokenizer.vocabulary._fast is None
    assert "sentencepiece encodes everything" in caplog.text
    assert tokenizer.encode("new york is in") == before


def test_a_model_whose_ids_would_differ_is_left_to_sentencepiece(monkeypatch, caplog):
    real = FastEncoder.encode
    monkeypatch.setattr(FastEncoder, "encode", lambda self, text: real(self, text)[::-1])
    with caplog.at_level(logging.INFO):
        assert FastEncoder.of(tiny_tokenizer().vocabulary.pieces) is None
    assert "gives other ids for this tokenizer" in caplog.text


def test_without_the_library_sentencepiece_does_it_all(monkeypatch, caplog):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "gigatoken":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    tokenizer = Tokenizer.load(tiny_tokenizer_folder())
    with caplog.at_level(logging.INFO):
        tokenizer.use_fast_encoder()
    assert tokenizer.encode_array("the fox").tolist() == tokenizer.encode("the fox")
    assert "gigatoken is not installed" in caplog.text
