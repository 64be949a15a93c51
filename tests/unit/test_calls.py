"""Tool calls: read from what training writes, from what models write, and from broken text."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm3cli.data.tokens.calls import ReplyStream
from glm3cli.data.tokens.formats.base import parse_reply
from glm3cli.data.tokens.formats.python_calls import call_text, read_calls
from glm3cli.data.tokens.messages import Message, ToolCall
from tests.support.tiny_tokenizer import tiny_tokenizer

CALL = "get_weather\n```python\ntool_call(city='北京', days=3)\n```"
WEATHER = ToolCall("get_weather", {"city": "北京", "days": 3})
ASSISTANT = "<|assistant|>"

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
# A name may be a word of Python, or no word at all; brackets, commas and the like end it.
names = st.sampled_from(["from", "class", "first-name", "a b", "城市"]) | st.from_regex(
    r"\A[A-Za-z_]([\w.-]{0,8}\w)?\Z"
)
pieces = st.sampled_from(
    [
        "get_weather",
        "\n",
        "```",
        "python",
        "tool_call(",
        "city='",
        "北",
        "')",
        " ",
        "fox",
        "a=1",
        ",",
    ]
)


def of(text: str) -> list[ToolCall]:
    return read_calls(parse_reply(text))


@settings(max_examples=300)
@given(st.dictionaries(names, values, max_size=4))
def test_what_training_writes_is_read(arguments):
    message = Message("assistant", call_text(arguments), metadata="a_tool")
    assert read_calls(message) == [ToolCall("a_tool", arguments)]


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        CALL.removesuffix("\n```"),
        "get_weather\n```python\ntool_call(city='北京', days=3)```",
        "get_weather \n ```python\n  tool_call(\n    city='北京',\n    days=3,\n  )\n```\n\n",
        "get_weather\n```\ntool_call(city='北京',\ndays=3)\n```",
        "get_weather\ntool_call(city='北京', days=3)",
        "get_weather\n```py\n# now\ntool_call(city=\"北\" '京', days=3)  # done\n```",
    ],
)
def test_models_write_a_call_in_many_ways(text):
    assert of(text) == [WEATHER]


def test_a_turn_may_have_several_calls():
    text = "f\n```python\ntool_call(a=1)\ntool_call(a=-2.5, b=[(1, None)])\n```"
    assert of(text) == [
        ToolCall("f", {"a": 1}),
        ToolCall("f", {"a": -2.5, "b": [[1, None]]}),
    ]


def test_values_may_be_spelled_as_in_json():
    [call] = of("f\n```python\ntool_call(a=true, b={'c': null}, d=[False, -inf], e=nan)\n```")
    assert math.isnan(call.arguments.pop("e"))
    assert call.arguments == {"a": True, "b": {"c": None}, "d": [False, -math.inf]}


def test_an_interpreter_gets_code():
    code = "import math\nprint(math.pi)"
    assert of(f"interpreter\n```python\n{code}\n```") == [ToolCall("interpreter", {"code": code})]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "get_weather",
        "The fox.\nIt jumps.",
        "\n```python\ntool_call(a=1)\n```",
        "\n get_weather\n```python\ntool_call(a=1)\n```",
        "f\n```python\n```",
        "f\n```python\ntool_call(a=1\n```",
        "f\n```python\ntool_call(a='1)\n```",
        "f\n```python\ntool_call(1)\n```",
        "f\n```python\ntool_call(a=1, a=2)\n```",
        "f\n```python\ntool_call(=1)\n```",
        "f\n```python\ntool_call('a'=1)\n```",
        "f\n```python\ntool_call(a=open('x'))\n```",
        "f\n```python\ntool_call(a=1 + 1)\n```",
        "f\n```python\ntool_call(a={1: 2})\n```",
        "f\n```python\ntool_call(**{'a': 1})\n```",
        "f\n```python\ntool_call(a=b'1')\n```",
        "f\n```python\ntool_call(a=-True)\n```",
        "f\n```python\nother(a=1)\n```",
        "f\n```python\nx = tool_call(a=1)\n```",
        "f\n```python\n\ttool_call(a=1)\n  tool_call(a=2)\n```",
        "f\n```python\ntool_call(a=1)\n```\nI have called f.",
        f"f\n```python\ntool_call(a={'[' * 5000}{']' * 5000})\n```",
        f"f\n```python\ntool_call(a={'-' * 100000}1)\n```",
        "f\n```python\ntool_call(a='\0')\n```",
        "two words\n```python\ntool_call(a=1)\n```",
        "interpreter\nprint(1)",
    ],
)
def test_what_is_no_call_stays_text(text):
    assert of(text) == []


def streamed(ids: list[int]) -> tuple[str, list[Message]]:
    stream = ReplyStream(tiny_tokenizer())
    shown = "".join([stream.push(token) for token in ids]) + stream.finish()
    return shown, stream.messages


def ids_of(*turns: str) -> list[int]:
    tokenizer, ids = tiny_tokenizer(), list[int]()
    for index, turn in enumerate(turns):
        ids += [tokenizer.special(ASSISTANT)] * (index > 0) + tokenizer.encode(turn)
    return ids


def test_a_call_after_a_text():
    shown, messages = streamed(ids_of("\n I look it up.", CALL))
    assert shown == "I look it up."
    assert messages[0] == Message("assistant", "I look it up.")
    assert [read_calls(message) for message in messages] == [[], [WEATHER]]


def test_two_texts_stand_below_each_other():
    assert streamed(ids_of("\n fox", "dog\nwolf"))[0] == "fox\ndog\nwolf"


def test_text_comes_at_once_and_calls_don_t():
    """Each text begins with the pieces that are shown late; then every token is."""
    for late, text in (("\n ", "the quick fox"), ("the", " quick\nfox"), ("f\n", "x```y z")):
        tokenizer, stream = tiny_tokenizer(), ReplyStream(tiny_tokenizer())
        seen = ""
        for token in tokenizer.encode(late + text):
            seen += stream.push(token)
            whole = tokenizer.decode(tokenizer.encode(late + text))
            if len(seen) > 0:
                assert whole.lstrip().startswith(seen)
        assert seen + stream.finish() == whole.lstrip()
        assert seen == whole.lstrip()
    stream = ReplyStream(tiny_tokenizer())
    assert [stream.push(token) for token in ids_of(CALL)] == [""] * len(ids_of(CALL))
    assert stream.finish() == ""


@settings(max_examples=300)
@given(st.lists(st.lists(pieces, max_size=9).map("".join), min_size=1, max_size=3))
def test_a_stream_shows_all_text_and_no_call(turns):
    tokenizer = tiny_tokenizer()
    shown, messages = streamed(ids_of(*turns))
    texts = [tokenizer.decode(tokenizer.encode(turn)) for turn in turns]
    assert messages == [parse_reply(text) for text in texts]
    expected = []
    for text, message in zip(texts, messages, strict=True):
        if not read_calls(message):
            first, _, rest = text.partition("\n")
            expected.append(rest.lstrip() if "\n" in text and not first.strip() else text)
    assert shown == "\n".join(text for text in expected if text)
