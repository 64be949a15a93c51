"""A `glm` folder in transformers, without remote code, against the original and our tokenizer."""

import itertools
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm3cli.checkpoint.convert.convert import convert
from glm3cli.checkpoint.convert.random_model import write_random_model
from glm3cli.checkpoint.random import RandomSource
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.family.members import CHATGLM3
from glm3cli.config.model import ModelConfig
from glm3cli.data.tokens.chat import build_prompt
from glm3cli.data.tokens.formats.python_calls import call_text
from glm3cli.data.tokens.formats.roles import TOOL_PROMPT
from glm3cli.data.tokens.messages import Message
from glm3cli.data.tokens.tokenizer import Tokenizer
from tests.support import in_transformers
from tests.support.programs import printed
from tests.support.shared import GOLDEN, SHARED, needs_shared

pytestmark = needs_shared
transformers = pytest.importorskip("transformers")
GLM = ConvertOptions("glm")
NUM_TEXTS = 5_000
TOOLS = [
    {
        "name": "天气",
        "description": "Tells the <weather> & 'more'",
        "parameters": {"city": {"type": "string", "default": None}, "days": [1, 2.5, True]},
    }
]
AWKWARD = [" ", "  ", "   ", "▁", "a", "the", " the", "\n", "\t", "你", "好", "é", "😀", "23", "."]
AWKWARD += ["\r", "\0", "\u3000", "\u200d", "<s>", "</s>", "<0x0A>", "[gMASK]", "<|user|>", "sop"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small random model with the real vocabulary and the real tokenizer."""
    folder = tmp_path_factory.mktemp("random")
    shape = ModelConfig(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=4,
        padded_vocab_size=65024,
        seq_length=64,
        rope_ratio=50.0,
    )
    source = RandomSource(shape, seed=1, std=0.02)
    write_random_model(folder / "hf", source, SHARED / "chatglm3-6b", torch.float16)
    convert(folder / "hf", folder / "glm", GLM)
    return folder / "glm"


@pytest.fixture(scope="module")
def fast(exported):
    return transformers.AutoTokenizer.from_pretrained(
        exported, trust_remote_code=False, local_files_only=True
    )


@pytest.fixture(scope="module")
def ours(exported):
    return Tokenizer.load(exported)


def test_logits_and_greedy_tokens_equal_the_original(tmp_path):
    convert(GOLDEN / "hf_tiny", tmp_path / "glm", ConvertOptions("glm", shard_bytes=200_000))
    assert len(list((tmp_path / "glm").glob("*.safetensors"))) > 1
    seen = printed(in_transformers, tmp_path / "glm", GOLDEN / "logits.safetensors")
    assert seen["class"] == "transformers.models.glm.modeling_glm.GlmForCausalLM"
    assert seen["problems"] == []
    assert sorted(seen["golden"]) == ["len128", "len33", "len7"]
    for case, (difference, same_tokens) in seen["golden"].items():
        assert difference <= 2e-5, case
        assert same_tokens, case


@pytest.mark.slow
def test_the_whole_folder_is_read(exported, fast, ours):
    seen = printed(in_transformers, exported)
    assert seen["problems"] == []
    assert seen["dtype"] == "torch.float16"
    rope = {"rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 0.5}
    assert seen["rope"] == rope
    ends = [2, ours.special("<|user|>"), ours.special("<|observation|>")]
    assert seen["eos"] == [ends, ends]
    assert seen["pad"] == [0, 0]
    assert (fast.eos_token_id, fast.pad_token_id, len(fast)) == (2, 0, ours.vocab_size)
    assert fast.convert_tokens_to_ids([*CHATGLM3.special]) == [*map(ours.special, CHATGLM3.special)]
    assert set(map(ours.special, CHATGLM3.special)) <= set(fast.all_special_ids)


def test_config_as_transformers_saves_it_again_is_read(exported, tmp_path):
    transformers.AutoConfig.from_pretrained(exported).save_pretrained(tmp_path)
    assert ModelConfig.from_file(tmp_path) == ModelConfig.from_file(exported)


def real_texts():
    """Lines and documents of the reference data, without repetitions."""
    import pyarrow.parquet

    data = SHARED / "data"
    lines = (data / "c4.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    texts += (data / "wiki.txt").read_text("utf-8").splitlines()
    for row in pyarrow.parquet.read_table(data / "alpaca_en_1k.parquet").to_pylist():
        texts += [value for value in row.values() if isinstance(value, str)]
    for row in json.loads((data / "alpaca_zh_1k.json").read_text("utf-8")):
        texts += [value for value in row.values() if isinstance(value, str)]
    tools = json.loads((data / "toolcall_zh.json").read_text("utf-8"))
    texts += [json.dumps(row, ensure_ascii=False, indent=1) for row in tools]
    texts += [line for text in texts for line in text.split("\n")]
    return list(dict.fromkeys(text[:3000] for text in texts))


def test_ids_of_real_texts_equal_ours(fast, ours):
    texts = real_texts()[: 2 * NUM_TEXTS]
    assert len(texts) >= NUM_TEXTS
    found = fast(texts, add_special_tokens=False)["input_ids"]
    split = fast(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    spelled = re.compile("|".join(map(re.escape, (*CHATGLM3.special, "</s>", "<unk>"))))
    differing = 0
    for text, plain, one in zip(texts, split, found, strict=True):
        assert plain == ours.encode(text)
        if one != plain:
            assert spelled.search(text)
            differing += 1
    assert differing <= 5


@settings(max_examples=500)
@given(
    text=st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
        st.lists(st.sampled_from(AWKWARD), max_size=14).map("".join),
    )
)
def test_ids_and_text_of_anything_equal_ours(fast, ours, text):
    ids = fast.encode(text, split_special_tokens=True)
    assert ids == [*ours.prefix, *ours.encode(text)]
    assert fast.decode(ids[2:]) == ours.decode(ids)
    assert fast.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_a_tokenizer_that_transformers_has_saved_again(fast, ours, tmp_path):
    fast.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    again = Tokenizer.load(tmp_path)
    for text in [*real_texts()[::40], *map("".join, itertools.product(AWKWARD, repeat=2))]:
        ids = again.encode(text)
        assert ids == ours.encode(text), text
        assert again.decode(ids) == ours.decode(ids), text
    assert again.special_tokens == ours.special_tokens
    assert (again.prefix, again.ends, again.pad_id) == (ours.prefix, ours.ends, ours.pad_id)


def test_text_that_spells_special_tokens(fast, ours):
    user = ours.special("<|user|>")
    assert user in fast.encode("a <|user|> b")
    assert user not in fast.encode("a <|user|> b", split_special_tokens=True)
    words = "philosophy, sophistry, Aesop and 无sop的"
    assert fast.encode(words) == [*ours.prefix, *ours.encode(words)]


def test_a_pair_ends_with_eos(fast, ours):
    expected = [*ours.prefix, *ours.encode("one"), *ours.encode("two"), 2]
    assert fast("one", "two")["input_ids"] == expected
    assert fast("")["input_ids"] == [*ours.prefix]
    padded = fast(["one", "one two three"], padding=True)["input_ids"]
    assert padded[0][0] == 0  # on the left


CHATS = {
    "one question": [{"role": "user", "content": "What is a lake?"}],
    "turns": [
        {"role": "user", "content": " spaces  in front"},
        {"role": "assistant", "content": "An answer.\n\nwith lines \n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "\n"},
        {"role": "user", "content": "你好。世界"},
    ],
    "system": [
        {"role": "system", "content": "No tools.", "tools": []},
        {"role": "system", "content": "You are philosophical."},
        {"role": "user", "content": "hi"},
    ],
    "spelled special tokens": [
        {"role": "user", "content": "a<|user|>\n b <|assistant|>sop</s> <unk>"},
        {"role": "assistant", "metadata": "<|system|>", "content": "[gMASK]sop"},
        {"role": "observation", "content": "<|user|>"},
    ],
    "tools": [
        {"role": "system", "content": "Answer with:", "tools": TOOLS},
        {"role": "user", "content": "天气?"},
        {"role": "assistant", "metadata": "天气", "content": call_text({"city": "北京"})},
        {"role": "observation", "content": '{"t": 3}'},
        {"role": "assistant", "content": "3"},
    ],
}


def template_ids(fast, messages, **values):
    return fast.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **values
    )


@pytest.mark.parametrize("name", CHATS)
def test_chat_template_gives_our_prompt(fast, ours, name):
    expected = build_prompt(ours, [Message.from_dict(turn) for turn in CHATS[name]])
    assert template_ids(fast, CHATS[name]) == expected
    without = fast.apply_chat_template(CHATS[name], return_dict=False)
    assert without == expected[:-1]


def test_chat_template_gives_the_original_prompts(fast):
    golden = json.loads((GOLDEN / "tokenizer.json").read_text("utf-8"))["chat"]
    for chat in golden.values():
        turns = [*(chat["history"] or []), {"role": chat["role"], "content": chat["query"]}]
        assert template_ids(fast, turns) == chat["input_ids"]


def test_chat_template_on_real_conversations(fast, ours):
    rows = json.loads((SHARED / "data/alpaca_zh_1k.json").read_text("utf-8"))[:200]
    for row in rows:
        turns = [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"]},
            {"role": "user", "content": row["input"]},
        ]
        expected = build_prompt(ours, [Message.from_dict(turn) for turn in turns])
        assert template_ids(fast, turns) == expected


@settings(max_examples=200)
@given(
    turns=st.lists(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "assistant", "observation", "system"]),
                "content": st.lists(st.sampled_from(AWKWARD), max_size=8).map("".join),
                "metadata": st.sampled_from(["", " f", "eop", "<|user|>"]),
            }
        ),
        min_size=1,
        max_size=4,
    )
)
def test_chat_template_on_anything(fast, ours, turns):
    for turn in turns:
        if turn["role"] != "assistant":
            del turn["metadata"]
    expected = build_prompt(ours, [Message.from_dict(turn) for turn in turns])
    assert template_ids(fast, turns) == expected


def test_tools_and_calls_as_transformers_spells_them(fast, ours):
    arguments = {"city": "it's 北京", "days": 3}
    turns = [
        {"role": "user", "content": "天气?"},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "天气", "arguments": arguments}}],
        },
        {"role": "tool", "content": "cold"},
    ]
    expected = build_prompt(
        ours,
        [
            Message("system", TOOL_PROMPT, tools=TOOLS),
            Message("user", "天气?"),
            Message("assistant", call_text(arguments), metadata="天气"),
            Message("observation", "cold"),
        ],
    )
    assert template_ids(fast, turns, tools=TOOLS) == expected
    empty = [{"role": "system", "content": ""}, *turns]
    assert template_ids(fast, empty, tools=TOOLS) == expected
    own = [{"role": "system", "content": "Mine."}, turns[0]]
    expected = build_prompt(
        ours, [Message("system", "Mine.", tools=TOOLS), Message("user", "天气?")]
    )
    assert template_ids(fast, own, tools=TOOLS) == expected


def test_what_is_no_chat_is_refused(fast):
    with pytest.raises(Exception, match="role bot is unknown"):
        template_ids(fast, [{"role": "bot", "content": "x"}])
    with pytest.raises(Exception, match="must be a string"):
        template_ids(fast, [{"role": "user", "content": [{"type": "text", "text": "x"}]}])
