"""Tokens that files list beside a vocabulary: found in text and decoded as by `tokenizers`."""

import itertools
import json
import shutil

import pytest
import tokenizers

from glm3cli.config.family.members import CHATGLM3, GLM4
from glm3cli.data.tokens.fast.tokenizer import to_fast
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError
from tests.support.tiny_ranks import tiny_ranks_folder
from tests.support.tiny_tokenizer import tiny_tokenizer, tiny_tokenizer_folder

FOLDERS = {"pieces": tiny_tokenizer_folder, "ranks": tiny_ranks_folder}
FLAGS = {
    "<n>": {},
    "<r>": {"normalized": False},
    "<r>x": {"normalized": False},
    "<l>": {"normalized": False, "lstrip": True},
    "<t>": {"normalized": False, "rstrip": True},
    "<nl>": {"lstrip": True},
    "<nt>": {"rstrip": True},
    "fox": {"normalized": False, "single_word": True},
    "box": {"single_word": True},
    "天气很": {},
}
AROUND = ["", "a", " ", "  ", "\n", " \n ", "▁", "你好 ", "é😀"]
TEXTS = [a + name + b for name in FLAGS for a, b in itertools.product(AROUND, repeat=2)]
TEXTS += [a + b + c for a, b in itertools.product(FLAGS, repeat=2) for c in (" q", "q")]
TEXTS += ["", " ", "a fox and foxes", "xbox box", "no token of these", "<|user|>[gMASK]</s>"]


def saved(tokenizer, folder):
    """Writes a tokenizer.json as `tokenizers` saves it, with the tokens of `FLAGS`."""
    theirs = tokenizers.Tokenizer.from_str(json.dumps(to_fast(tokenizer)))
    theirs.add_tokens([tokenizers.AddedToken(name, **flags) for name, flags in FLAGS.items()])
    folder.mkdir()
    theirs.save(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return theirs


@pytest.mark.parametrize("kind", FOLDERS)
def test_added_tokens_have_the_ids_and_texts_of_tokenizers(tmp_path, kind):
    plain = Tokenizer.load(FOLDERS[kind]())
    theirs = saved(plain, tmp_path / "json")
    shutil.copytree(tmp_path / "json", tmp_path / "both")
    shutil.copy(plain.path, tmp_path / "both")
    (tmp_path / "again").mkdir()
    alone, both = Tokenizer.load(tmp_path / "json"), Tokenizer.load(tmp_path / "both")
    (tmp_path / "again/tokenizer.json").write_text(json.dumps(to_fast(both)))
    again = Tokenizer.load(tmp_path / "again")
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        for ours in (alone, both, again):
            assert ours.encode(text) == ours.encode_array(text).tolist() == ids, text
            assert ours.decode(ids) == theirs.decode(ids), text
    assert alone.special_tokens == both.special_tokens == plain.special_tokens
    assert alone.vocab_size == theirs.get_vocab_size()
    new = theirs.token_to_id("<nt>")
    assert new > plain.vocab_size > theirs.token_to_id("fox")  # which the vocabulary has as well
    assert (alone.token_name(new), alone.is_special(new)) == ("<nt>", False)
    assert both.sha256 != plain.sha256


def test_a_tokenizer_json_of_pieces_alone_is_the_sentencepiece_model(tmp_path):
    plain = tiny_tokenizer()
    content = to_fast(plain)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    again = Tokenizer.load(tmp_path)
    again.use_fast_encoder()
    for text in [*TEXTS, "the quick brown\n\tfox ▁ 你好世界 é😀\0 <s> <0x0A>", "\ud800 a"]:
        ids = again.encode(text)
        assert ids == plain.encode(text), text
        assert again.decode(ids) == plain.decode(ids), text
    assert again.special_tokens == plain.special_tokens
    assert to_fast(again) == content
    model = content["model"]
    wrong = {
        "merges": content | {"model": model | {"merges": model["merges"][1:]}},
        "bytes": content | {"model": model | {"vocab": {**model["vocab"], "<0x00>": 1000}}},
        "otherwise": content | {"normalizer": None},
    }
    for reason, other in wrong.items():
        path.write_text(json.dumps(other))
        with pytest.raises(DataError, match=reason):
            Tokenizer.load(tmp_path)


def test_slow_tokenizers_find_added_tokens_in_the_text_itself(tmp_path):
    plain = tiny_tokenizer()
    shutil.copy(plain.path, tmp_path)
    first = plain.vocab_size
    added = {str(first): {"content": "<n>", "normalized": True, "rstrip": True}}
    added[str(first + 1)] = {"content": "<|sp|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<m>": first + 2}))
    ours = Tokenizer.load(tmp_path)
    a, b = plain.encode("the fox"), plain.encode("over")
    assert ours.encode("the fox<n> \nover<m>over") == [*a, first, *b, first + 2, *b]
    assert ours.decode([*a, first, first + 2]) == "the fox<n><m>"
    assert ours.encode("<|sp|>") == plain.encode("<|sp|>")  # special tokens stay text
    assert ours.special("<|sp|>") == first + 1
    assert ours.decode([first + 1], skip_special=False) == "<|sp|>"


@pytest.mark.parametrize(("kind", "traits"), [("pieces", CHATGLM3), ("ranks", GLM4)])
def test_a_list_of_some_special_tokens_leaves_the_others(tmp_path, kind, traits):
    plain = Tokenizer.load(FOLDERS[kind]())
    shutil.copy(plain.path, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    user = {"content": "<|user|>", "special": True}
    some = {str(plain.special("<|user|>")): user, str(plain.vocab_size): {"content": "<n>"}}
    path.write_text(json.dumps({"added_tokens_decoder": some}))
    ours = Tokenizer.load(tmp_path)
    assert ours.special_tokens == plain.special_tokens
    assert list(ours.special_tokens) == list(traits.special)
    assert (ours.prefix, ours.ends) == (plain.prefix, plain.ends)
    moved = {str(plain.vocab_size): user}
    path.write_text(json.dumps({"added_tokens_decoder": moved}))
    ours = Tokenizer.load(tmp_path)
    assert ours.special_tokens == plain.special_tokens | {"<|user|>": plain.vocab_size}
    taken = {str(plain.special("[gMASK]")): {"content": "<n>"}}
    path.write_text(json.dumps({"added_tokens_decoder": taken}))
    with pytest.raises(DataError, match=r"have no \[gMASK\]"):
        Tokenizer.load(tmp_path)
