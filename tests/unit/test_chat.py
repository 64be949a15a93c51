"""Prompts against the original's, training samples against a plain re-derivation."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm3cli.data.preprocess import rows
from glm3cli.data.tokens.chat import build_prompt, build_sample, truncate
from glm3cli.data.tokens.formats.base import parse_reply
from glm3cli.data.tokens.formats.python_calls import call_text
from glm3cli.data.tokens.messages import IGNORED_LABEL, Message, system_turn
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError
from tests.support.shared import GOLDEN, SHARED, needs_shared
from tests.support.tiny_tokenizer import tiny_tokenizer

CHATS = (
    json.loads((GOLDEN / "tokenizer.json").read_text("utf-8"))["chat"] if GOLDEN.is_dir() else {}
)
ROLES = ["system", "user", "assistant", "observation"]

messages = st.lists(
    st.builds(
        Message,
        role=st.sampled_from(ROLES),
        content=st.text(alphabet="ab 好\n", max_size=8),
        metadata=st.sampled_from(["", "", "get_weather"]),
        loss=st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


def plain_sample(tokenizer: Tokenizer, conversation: list[Message]) -> tuple[list[int], list[int]]:
    """ChatGLM3's own fine-tuning rule: a token has loss if an assistant's turn predicts it."""
    ids, predicted_by_answer = [*tokenizer.prefix], [False, False]
    for message in conversation:
        turn = [tokenizer.special(f"<|{message.role}|>")]
        turn += tokenizer.encode(message.metadata + "\n") + tokenizer.encode(message.content)
        ids += turn
        predicted_by_answer += [message.role == "assistant" and message.loss] * len(turn)
    ids.append(2)
    shifted = [False, *predicted_by_answer]
    return ids, [token if yes else -100 for token, yes in zip(ids, shifted, strict=True)]


@needs_shared
@pytest.mark.parametrize("name", CHATS)
def test_prompts_are_the_original_ones(name):
    chat = CHATS[name]
    history = [Message.from_dict(turn) for turn in chat["history"] or []]
    tokenizer = Tokenizer.load(SHARED / "chatglm3-6b")
    prompt = build_prompt(tokenizer, [*history, Message(chat["role"], chat["query"])])
    assert prompt == chat["input_ids"]


@needs_shared
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": ""}]])
def test_training_and_generation_have_the_original_text_in_front_of_tools(system):
    chat = CHATS["tool_call"]
    tools = chat["history"][0]["tools"]
    question = {"role": "user", "content": chat["query"]}
    row = {"messages": [*system, question], "tools": json.dumps(tools)}
    tokenizer = Tokenizer.load(SHARED / "chatglm3-6b")
    assert build_prompt(tokenizer, rows.openai(row)) == chat["input_ids"]
    asked = [system_turn("", tools), Message("user", chat["query"])]
    assert build_prompt(tokenizer, asked) == chat["input_ids"]


@pytest.mark.parametrize("tools", [None, [], ""])
def test_no_tools_are_none(tools):
    assert system_turn("", tools) is None
    assert system_turn("Be kind.", tools) == Message("system", "Be kind.")


@settings(max_examples=200)
@given(conversation=messages)
def test_a_sample_equals_the_plain_derivation(conversation):
    tokenizer = tiny_tokenizer()
    sample = build_sample(tokenizer, conversation)
    assert (sample.input_ids, sample.labels) == plain_sample(tokenizer, conversation)


def test_a_sample_starts_with_the_prompt_that_generation_uses():
    tokenizer = tiny_tokenizer()
    asked = [Message("system", "be kind"), Message("user", "the fox")]
    prompt = build_prompt(tokenizer, asked)
    sample = build_sample(tokenizer, [*asked, Message("assistant", "jumps")])
    assert sample.input_ids[: len(prompt)] == prompt
    assert set(sample.labels[: len(prompt)]) == {IGNORED_LABEL}
    assert sample.labels[len(prompt) :] == sample.input_ids[len(prompt) :]
    assert sample.labels[-1] == tokenizer.eos_id


def test_every_answer_learns_to_stop():
    """An answer ends with the next role token or eos; a model that never learns it goes on."""
    tokenizer = tiny_tokenizer()
    user, observation = tokenizer.special("<|user|>"), tokenizer.special("<|observation|>")
    conversation = [
        Message("user", "a"),
        Message("assistant", "b", metadata="tool"),
        Message("observation", "c"),
        Message("assistant", "d"),
        Message("user", "e"),
        Message("assistant", "f"),
    ]
    labels = build_sample(tokenizer, conversation).labels
    assert [
        label for label in labels if tokenizer.is_special(label) and label != IGNORED_LABEL
    ] == [
        observation,
        user,
        tokenizer.eos_id,
    ]


def test_a_turn_without_loss_trains_nothing_of_itself():
    tokenizer = tiny_tokenizer()
    conversation = [
        Message("user", "a"),
        Message("assistant", "dog", loss=False),
        Message("user", "b"),
        Message("assistant", "fox"),
    ]
    trained = [
        label for label in build_sample(tokenizer, conversation).labels if label != IGNORED_LABEL
    ]
    assert tokenizer.decode(trained).strip() == "fox"
    assert trained[-1] == tokenizer.eos_id


@settings(max_examples=300)
@given(conversation=messages, length=st.integers(8, 60))
def test_a_cut_sample_keeps_the_end_of_its_last_answer(conversation, length):
    tokenizer = tiny_tokenizer()
    whole = build_sample(tokenizer, conversation)
    cut = truncate(tokenizer, whole, length)
    if len(whole.input_ids) <= length:
        assert cut is whole
        return
    if cut is None:
        assert set(whole.labels[:length]) == {IGNORED_LABEL}
        return
    assert len(cut.input_ids) == len(cut.labels) <= length
    assert cut.input_ids[:-1] == whole.input_ids[: len(cut.input_ids) - 1]
    assert cut.labels[:-1] == whole.labels[: len(cut.labels) - 1]
    assert cut.labels[-1] == cut.input_ids[-1]
    assert tokenizer.is_special(cut.labels[-1])


def test_a_cut_in_a_modellink_answer_keeps_eos():
    tokenizer = tiny_tokenizer()
    conversation = [Message("user", "the fox"), Message("assistant", "the lazy dog " * 20)]
    whole = build_sample(tokenizer, conversation, "modellink", append_eod=True)
    length = len(whole.input_ids) - 10
    cut = truncate(tokenizer, whole, length)
    assert cut is not None
    assert len(cut.input_ids) == length
    assert cut.input_ids[-1] == cut.labels[-1] == tokenizer.eos_id
    assert truncate(tokenizer, whole, 20) is None  # only a piece of the prompt would be left


def test_system_turns_show_their_tools():
    tools = [{"name": "get_weather", "description": "天气"}]
    text = tiny_tokenizer().chat.text(Message("system", "Use:", tools=tools))
    assert text == "Use:\n" + json.dumps(tools, indent=4, ensure_ascii=False)


@pytest.mark.parametrize(
    ("reply", "metadata", "content"),
    [
        (" \n The fox. ", "", "The fox."),
        ("The fox.", "", "The fox."),
        ("get_weather\n```python\ntool_call(city='北京')\n```", "get_weather", None),
    ],
)
def test_replies_are_split_into_metadata_and_content(reply, metadata, content):
    message = parse_reply(reply)
    assert message.metadata == metadata
    assert message.content == (content or call_text({"city": "北京"}))


def test_a_bad_turn_is_a_sentence():
    with pytest.raises(DataError, match="role 'robot' is unknown"):
        Message.from_dict({"role": "robot", "content": "a"})
    with pytest.raises(DataError, match="content of a user turn is None"):
        Message.from_dict({"role": "user"})
