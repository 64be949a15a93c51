"""The tokenizer of GLM-4: ids of tiktoken, special tokens as text, and decoding byte by byte."""

import json
import pickle

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from glm3cli.config.family.members import GLM4
from glm3cli.data.tokens.fast.tokenizer import to_fast
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.data.tokens.vocabulary import long_space
from glm3cli.errors import DataError
from tests.support.shared import GOLDEN, SHARED, needs_shared
from tests.support.tiny_ranks import tiny_ranks, tiny_ranks_folder

FACTS = json.loads((GOLDEN / "glm4_tokenizer.json").read_text("utf-8")) if GOLDEN.is_dir() else {}
PARTS = [" ", "  ", "\n", "\r\n", "\t", "\u3000", "\x85", "a", "the", "你", "é", "😀", "12", "'s"]
PARTS += [".", "!\n", "-", "\0", "\u200d", "<|user|>", "[gMASK]", "<sop>"]
texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PARTS), max_size=14).map("".join))


def reference(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """What GLM-4's tokenization_chatglm.py makes of the file."""
    return tiktoken.Encoding(
        "glm4",
        pat_str=GLM4.pattern,
        mergeable_ranks=tokenizer.vocabulary.ranks,
        special_tokens=tokenizer.special_tokens,
    )


@needs_shared
def test_ids_and_facts_of_the_real_folder():
    tokenizer, facts = Tokenizer.load(SHARED / "glm-4-9b-chat"), FACTS["facts"]
    assert tokenizer.special_tokens == facts["special"]
    assert tokenizer.vocabulary.pattern == facts["pattern"]
    assert tokenizer.vocabulary.size == facts["num_ranks"]
    assert list(tokenizer.ends) == facts["eos_token_ids"]
    assert tokenizer.pad_id == facts["pad_token_id"]
    for case in FACTS["cases"]:
        ids = tokenizer.encode(case["text"])
        assert ids == case["input_ids"]
        assert tokenizer.decode([*tokenizer.prefix, *ids]) == case["text"]


@settings(max_examples=400)
@given(text=texts)
def test_ids_and_text_are_tiktoken_s(text):
    tokenizer = tiny_ranks()
    ids = tokenizer.encode(text)
    assert ids == reference(tokenizer).encode(text, disallowed_special=())
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.decode(ids) == text.encode("utf-16", "surrogatepass").decode(
        "utf-16", "replace"
    )


@settings(max_examples=400)
@given(ids=st.lists(st.integers(0, 370), max_size=20))
def test_decoding_any_ids_is_tiktoken_s(ids):
    tokenizer = tiny_ranks()
    decoder = tokenizer.stream_decoder(skip_special=False)
    streamed = "".join(map(decoder.push, ids)) + decoder.finish()
    assert streamed == tokenizer.decode(ids, skip_special=False)
    texts = [i for i in ids if i < tokenizer.vocabulary.size]
    assert tokenizer.decode(texts) == reference(tokenizer).decode(texts)
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    assert all(name in streamed for i, name in names.items() if i in ids)


@settings(max_examples=400)
@given(text=st.lists(st.sampled_from(PARTS), max_size=14).map("".join))
def test_long_white_space_is_cut_where_words_end(text):
    tokenizer, plain = tiny_ranks(), reference(tiny_ranks())
    shortest = long_space.LONG_SPACE.pattern.replace("2048", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_space, "LONG_SPACE", long_space.re.compile(shortest))
        ids = []
        for part, is_word in long_space.without_long_space(text):
            ids += plain._encode_single_piece(part) if is_word else plain.encode_ordinary(part)
    assert ids == tokenizer.encode(text)


@pytest.mark.parametrize("space", [" ", "\n", "\u3000", "\t "])
def test_half_a_million_spaces_are_encoded(space):
    tokenizer, text = tiny_ranks(), f"a{space * 500_000}b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_traits():
    tokenizer = tiny_ranks()
    size = tokenizer.vocabulary.size
    assert [tokenizer.special(name) for name in GLM4.special] == list(range(size, size + 14))
    assert tokenizer.vocab_size == size + 14
    assert tokenizer.prefix == (tokenizer.special("[gMASK]"), tokenizer.special("<sop>"))
    assert tokenizer.eos_id == tokenizer.pad_id == tokenizer.special("<|endoftext|>")
    ends = ["<|endoftext|>", "<|user|>", "<|observation|>"]
    assert list(tokenizer.ends) == [tokenizer.special(name) for name in ends]
    assert tokenizer.token_name(tokenizer.special("<sop>")) == "<sop>"
    assert pickle.loads(pickle.dumps(tokenizer)).encode("the fox") == tokenizer.encode("the fox")


def test_special_tokens_and_ends_come_from_the_folder(tmp_path):
    size = tiny_ranks().vocabulary.size
    (tmp_path / "tokenizer.model").write_bytes(
        (tiny_ranks_folder() / "tokenizer.model").read_bytes()
    )
    names = {name: size + 20 + i for i, name in enumerate(GLM4.special)}
    added = {str(i): {"content": name} for name, i in names.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    ends = {"eos_token_id": [names["<|endoftext|>"], names["<|user|>"]]}
    (tmp_path / "config.json").write_text(json.dumps(ends))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.special_tokens == names
    assert tokenizer.vocab_size == size + 34
    assert list(tokenizer.ends) == ends["eos_token_id"]
    assert tokenizer.decode([size, 97]) == tokenizer.decode([97])  # an id without a token


def test_a_tokenizer_json_is_read_as_the_ranks_that_it_was_made_of(tmp_path):
    tokenizer = tiny_ranks()
    content = to_fast(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    again = Tokenizer.load(tmp_path)
    assert again.vocabulary.ranks == tokenizer.vocabulary.ranks
    assert again.special_tokens == tokenizer.special_tokens
    content["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="holds no byte pairs with ranks"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("lines", [b"YQ== 0\nYg== 2\n", b"YQ== 0\nYQ==\n", b"YQ== 0\n?? 1\n"])
def test_damaged_ranks_are_refused(lines, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(lines)
    with pytest.raises(DataError, match="holds no byte pairs with ranks"):
        Tokenizer.load(tmp_path)
