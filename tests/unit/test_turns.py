"""Turns of conversations in all spellings: the same messages, or a sentence with what is there."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm3cli.data.preprocess import rows
from glm3cli.data.preprocess.fields import RowError
from glm3cli.data.preprocess.trained import FLAGS
from glm3cli.data.tokens.messages import Message
from glm3cli.errors import DataError
from tests.support.preprocess_runs import outputs, run, write_lines
from tests.unit.test_handlers import handler

ARGUMENTS = {"city": "北京", "days": 2, "now": None}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
CALL = Message("assistant", "", "weather", arguments=ARGUMENTS)
FUNCTION = {"name": "weather", "arguments": TEXT}
BARE = Message("assistant", "", "weather", arguments={})


def read(*turns: object, column: str = "messages", **others: object) -> list[Message]:
    name = "openai" if column == "messages" else "share_gpt"
    return getattr(rows, name)({column: list(turns), **others})


def said(**turn: object) -> dict:
    return {"role": "assistant", **turn}


CALLS = {
    "OpenAI": said(
        content=None, tool_calls=[{"id": "1", "type": "function", "function": FUNCTION}]
    ),
    "OpenAI's older": said(content="", function_call=FUNCTION),
    "a call as text": said(content="", function_call=json.dumps(FUNCTION)),
    "calls as text": said(tool_calls=json.dumps([{"function": FUNCTION}])),
    "one call, no list": said(tool_calls={"function": FUNCTION}),
    "without function": said(tool_calls=[FUNCTION]),
    "null beside": said(content="", function_call=None, tool_calls=[FUNCTION]),
    "parsed arguments": said(tool_calls=[{"name": "weather", "arguments": ARGUMENTS}]),
    "parameters": said(tool_calls=[{"name": "weather", "parameters": ARGUMENTS}]),
    "args": said(tool_calls=[{"name": "weather", "args": ARGUMENTS}]),
    "input": said(tool_calls=[{"name": "weather", "input": ARGUMENTS, "type": "tool_use"}]),
    "args as text": said(tool_calls=[{"name": "weather", "args": TEXT, "arguments": None}]),
    "LLaMA-Factory": {"from": "function_call", "value": json.dumps(FUNCTION)},
    "a parsed value": {"from": "function_call", "value": FUNCTION},
    "a list of one": {"from": "function_call", "value": [FUNCTION]},
    "ms-swift": {"role": "tool_call", "content": json.dumps(FUNCTION)},
    "ChatGLM3": {"role": "tool", "name": "weather", "parameters": ARGUMENTS},
    "ChatGLM3 with an empty text": {
        "role": "tool",
        "name": "weather",
        "content": "",
        "value": "",
        "parameters": ARGUMENTS,
    },
}


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("turn", CALLS.values(), ids=CALLS)
def test_a_call_in_every_spelling(turn, column):
    assert read(turn, column=column) == [CALL]


@pytest.mark.parametrize(
    "function",
    [
        {"name": "weather"},
        {"name": "weather", "arguments": ""},
        {"name": "weather", "arguments": None},
        {"name": "weather", "arguments": "{}", "id": "7"},
    ],
)
def test_a_call_without_arguments(function):
    assert read(said(content="", tool_calls=[function])) == [BARE]


def test_chatglm3s_turns_of_tools():
    """The form that the README of its finetune_demo documents."""
    found = read(
        said(content="I look it up"),
        {
            "role": "tool",
            "name": "weather",
            "parameters": {"city": "北京"},
            "observation": {"温度": 20},
        },
        {"role": "tool", "name": "weather", "parameters": {}, "observation": "none", "loss": False},
        said(content="done"),
        column="conversations",
        tools=[{"name": "weather"}],
    )
    assert found[1:] == [
        Message("assistant", "I look it up"),
        Message("assistant", "", "weather", arguments={"city": "北京"}),
        Message("observation", '{"温度": 20}'),
        Message("assistant", "", "weather", loss=False, arguments={}),
        Message("observation", "none"),
        Message("assistant", "done"),
    ]


def test_a_text_and_calls_are_turns_of_their_own():
    found = read(said(content="I look", tool_calls=[FUNCTION, {"name": "weather"}], weight=0))
    assert [message.metadata for message in found] == ["", "weather", "weather"]
    assert not any(message.loss for message in found)


TURNS = {
    "role and content": {"role": "user", "content": "hi"},
    "from and value": {"from": "human", "value": "hi"},
    "role and value": {"role": "user", "value": "hi"},
    "from and content": {"from": "user", "content": "hi"},
    "nulls beside": {"from": None, "value": None, "role": "user", "content": "hi"},
    "nulls beside ShareGPT's": {"from": "human", "value": "hi", "role": None, "content": None},
    "both": {"from": "human", "role": "user", "content": "hi", "value": "hi"},
    "an empty text beside": {"from": "human", "content": "", "value": "hi"},
    "parts": {
        "role": "user",
        "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}],
    },
    "parts of other types": {
        "role": "user",
        "content": [{"type": "input_text", "text": "h"}, "", {"type": "output_text", "text": "i"}],
    },
    "keys that hold no call": {"role": "user", "content": "hi", "recall": 1, "images": []},
}


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
def test_a_text_in_every_spelling(turn, column):
    assert read(turn, column=column) == [Message("user", "hi")]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("developer", "system"),
        ("human", "user"),
        ("gpt", "assistant"),
        ("bot", "assistant"),
        ("tool", "observation"),
        ("function", "observation"),
        ("tool_response", "observation"),
        ("observation", "observation"),
    ],
)
def test_names_of_roles(name, role):
    assert read({"role": name, "content": "hi"})[0].role == role


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_tools_may_be_called_functions(column):
    tools = [{"name": "weather"}]
    for name, value in (("tools", tools), ("functions", tools), ("functions", json.dumps(tools))):
        [system, _] = read(said(content="a"), column=column, **{name: value})
        assert (system.role, system.tools) == ("system", tools)
    [system, _] = read({"role": "system", "content": "be", "functions": tools}, said(content="a"))
    assert (system.content, system.tools) == ("be", tools)
    assert rows.alpaca({"instruction": "a", "output": "b", "functions": tools}, False)[0].tools


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([json.dumps({"name": "f"}), {"name": "g"}], [{"name": "f"}, {"name": "g"}]),
        (json.dumps([json.dumps({"name": "f"})]), [{"name": "f"}]),
        ([None, {"name": "f"}], [{"name": "f"}]),
        (["f"], ["f"]),
        ([None], None),
    ],
)
def test_tools_may_be_texts_of_their_own_and_padded(tools, expected):
    """Sets that hold each tool as JSON, since Arrow has no type for tools that differ."""
    found = read(said(content="a"), tools=tools)
    assert [turn.tools for turn in found] == ([expected, None] if expected else [None])


def test_tools_of_a_turn_are_those_of_its_row_or_refused():
    tools = [{"name": "f"}]
    user, system = ({"role": role, "content": "a", "tools": tools} for role in ("user", "system"))
    for found in (read(user, said(content="b"), tools=tools), read(system, user, tools=tools)):
        assert [turn.tools for turn in found if turn.tools] == [tools]
        assert found[0].role == "system"
    for turns, others, field in (
        ([user], {}, "messages[0].tools"),
        ([user], {"tools": [{"name": "g"}]}, "messages[0].tools"),
        ([said(tool_calls=[FUNCTION], functions=tools)], {}, "messages[0].tools"),
        ([system], {"tools": [{"name": "g"}]}, "tools"),
    ):
        with pytest.raises(RowError) as caught:
            read(*turns, **others)
        assert caught.value.field == field


def result(name: object, content: str) -> dict:
    return {"role": "tool", "tool_call_id": name, "content": content}


def called(*names: object) -> dict:
    return said(content="", tool_calls=[{"id": name, "function": FUNCTION} for name in names])


@pytest.mark.parametrize(
    ("turns", "contents"),
    [
        ([called("1", "2"), result("2", "B"), result("1", "A")], "AB"),
        ([called(1, 2), result(2, "B"), result(1, "A")], "AB"),
        ([called("1"), called("2"), result("2", "B"), result("1", "A")], "AB"),
        (
            [
                called("2", "1"),
                result("1", "B"),
                result("2", "A"),
                called("1", "2"),
                result("2", "D"),
                result("1", "C"),
            ],
            "ABCD",
        ),
        ([called(None, None), result("2", "A"), result("1", "B")], "AB"),
        ([result("2", "A"), result("1", "B")], "AB"),
        ([called("1", "2"), result(None, "A"), result("", "B")], "AB"),
    ],
)
def test_results_are_in_the_order_of_their_calls(turns, contents):
    found = read(*turns)
    assert "".join(turn.content for turn in found if turn.role == "observation") == contents


def test_a_result_of_no_call_is_refused():
    with pytest.raises(RowError, match="id of a call before it, 1, 2; got str '3'") as caught:
        read(called("1", "2"), result("1", "A"), result("3", "B"))
    assert caught.value.field == "messages[2].tool_call_id"


def test_thoughts_are_refused_where_they_would_be_trained():
    user, thought = {"role": "user", "content": "a"}, said(content="b", reasoning_content="hm")
    with pytest.raises(RowError, match=r"messages\[1\].reasoning_content: isn't read"):
        read(user, thought)
    assert len(read(user, said(content="b", thinking=True, reasoning=""))) == 2
    assert len(read(user, thought, user)) == 3  # a prompt, which shows no earlier thoughts
    assert len(read(user, {**thought, "loss": False}, user, said(content="b"))) == 4


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_system_text_in_a_column_of_its_own(column):
    turns = [{"role": "system", "content": "be"}, said(content="a")]
    for name in ("system", "system_prompt"):
        others = {"system": "", name: "be"}
        assert read(turns[1], column=column, **others)[0] == Message("system", "be")
    with pytest.raises(RowError, match="system str 'be' and system_prompt str 'do'"):
        read(turns[1], column=column, system="be", system_prompt="do")
    assert len(read(*turns, column=column, system="be")) == 2
    found = read(*turns, column=column, system="be kind")
    assert [message.content for message in found] == ["be kind", "be", "a"]


WRONG = [
    ({"content": "a"}, "messages[0].role", "is missing; messages[0] has content"),
    (
        {"role": "tool", "name": "f"},
        "messages[0].content",
        "is missing; messages[0] has role, name",
    ),
    ({"role": "user", "from": "gpt", "content": ""}, "messages[0]", "role 'user', but from 'gpt'"),
    (
        {"role": "user", "content": "a", "value": "b"},
        "messages[0]",
        "content str 'a' and value str",
    ),
    (said(tool_calls=[{"arguments": {}}]), "messages[0].tool_calls[0]", "a call with name"),
    (
        said(tool_calls=[{"name": "f", "params": {}}]),
        "messages[0].tool_calls[0]",
        "has name, params",
    ),
    (
        said(tool_calls=[{"name": "f", "args": {"a": 1}, "input": {"a": 2}}]),
        "messages[0].tool_calls[0]",
        "expected one of them",
    ),
    (said(tool_calls=[{"name": "f", "args": [1]}]), "messages[0].tool_calls[0].args", "an object"),
    (said(tool_calls="["), "messages[0].tool_calls", "expected JSON"),
    (said(content="", toolCalls=[{"name": "f"}]), "messages[0].toolCalls", "isn't known"),
    (said(content="", tool_use={"name": "f"}), "messages[0].tool_use", "isn't known"),
    (said(content="", num_calls=2), "messages[0].num_calls", "isn't known"),
    (said(content=[{"type": "image_url"}]), "messages[0].content[0]", "a part of text"),
    ({"role": "user", "content": "a", "images": ["b"]}, "messages[0].images", "text alone"),
    (
        {"role": "tool", "name": "f", "content": "a", "parameters": {"b": 1}},
        "messages[0].content",
        "stands beside parameters and observation",
    ),
    (
        said(tool_calls=[{"name": "f", "args": {"a": pa.scalar(1)}}]),
        "messages[0].tool_calls[0].args",
        "values of JSON",
    ),
]


@pytest.mark.parametrize(("turn", "field", "problem"), WRONG)
def test_a_turn_that_does_not_fit_says_what_is_there(turn, field, problem):
    with pytest.raises(RowError) as caught:
        read(turn)
    assert caught.value.field == field
    assert problem in caught.value.problem


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    ("value", "trained"),
    [
        (None, True), (True, True), (1, True), (1.0, True), ("true", True), ("1", True),
        (False, False), (0, False), (0.0, False), ("false", False), ("False", False), ("0", False),
    ],
)  # fmt: skip
def test_a_turn_is_kept_out_of_training_in_every_spelling(flag, value, trained):
    assert read(said(content="a", **{flag: value}))[0].loss is trained
    assert (
        read({"from": "gpt", "value": "a", flag: value}, column="conversations")[0].loss is trained
    )


@pytest.mark.parametrize(
    ("turn", "field"),
    [
        ({"loss": 0.5}, "messages[0].loss"),
        ({"weight": 2}, "messages[0].weight"),
        ({"loss": "maybe"}, "messages[0].loss"),
        ({"loss_scale": [0]}, "messages[0].loss_scale"),
        ({"train_detail": [{"train": False}]}, "messages[0].train_detail"),
        ({"mask": 1}, "messages[0].mask"),
        ({"is-masked": True}, "messages[0].is-masked"),
        ({"loss": True, "weight": 0}, "messages[0]"),
    ],
)
def test_what_seems_to_say_it_otherwise_is_refused(turn, field):
    with pytest.raises(RowError) as caught:
        read(said(content="a", **turn))
    assert caught.value.field == field


def test_modellinks_template_trains_no_other_turn_than_the_last_answer():
    chat = handler("chat", template="modellink")
    turns = [{"role": "user", "content": "the fox"}, said(content="jumps")]
    plain = chat.encode({"messages": turns}).sequences
    assert (
        chat.encode({"messages": [*turns, {"role": "user", "content": "a dog"}]}).sequences == plain
    )
    with pytest.raises(RowError, match="at least one assistant turn"):
        chat.encode({"messages": [*turns, said(content="over", weight=0)]})
    with pytest.raises(RowError, match="use --template chatglm3"):
        chat.encode({"messages": [*turns, said(tool_calls=[FUNCTION])]})


def test_rows_of_tools_give_the_same_bytes_in_every_format(tmp_path):
    """Arrow pads the turns, calls and tools with nulls."""
    lines = [
        {"messages": [said(content="a", loss=False), turn, said(content="b")], "tools": tools}
        for turn, tools in [
            (
                said(tool_calls=[{"function": {"name": "f", "arguments": {"x": 1}}}]),
                [{"name": "f"}],
            ),
            (said(tool_calls=[{"args": {"y": "2"}, "name": "g"}]), [{"name": "g", "is": {"a": 1}}]),
            (said(function_call={"name": "h", "arguments": {"q": 1}}), []),
            ({"from": "gpt", "value": "c"}, [{"is": {"b": [1, 2]}}]),
            ({"role": "tool", "name": "i", "parameters": {"z": 0.5}, "observation": "3"}, None),
        ]
    ]
    table = pa.Table.from_pylist(lines)
    pq.write_table(table, tmp_path / "in.parquet")
    with (
        pa.OSFile(str(tmp_path / "in.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table)
    write_lines(tmp_path / "in.jsonl", lines)
    found = []
    for form in ("jsonl", "parquet", "arrow"):
        (tmp_path / form).mkdir()
        run(tmp_path / f"in.{form}", tmp_path / form / "out", handler="chat")
        found.append(outputs(tmp_path / form))
    assert found[0] == found[1] == found[2]


CHAT = [
    [{"role": "user", "content": "a"}, said(content="b")],
    [{"role": "user", "content": "你"}, said(content="c")],
]


def written_as(form: str, path: Path) -> None:
    """Writes CHAT in a form in which some programs keep turns."""
    if form == "in.csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["messages"])
            writer.writerows([json.dumps(turns, ensure_ascii=False)] for turns in CHAT)
    elif form == "texts.parquet":
        pq.write_table(pa.table({"messages": [json.dumps(turns) for turns in CHAT]}), path)
    elif form == "bytes.parquet":
        turn = pa.struct([("role", pa.binary()), ("content", pa.large_binary())])
        coded = [[{k: v.encode() for k, v in turn.items()} for turn in turns] for turns in CHAT]
        pq.write_table(pa.table({"messages": pa.array(coded, pa.list_(turn))}), path)
    elif form == "maps.parquet":
        turn = pa.map_(pa.binary(), pa.string())
        pairs = [[list(turn.items()) for turn in turns] for turns in CHAT]
        pq.write_table(pa.table({"messages": pa.array(pairs, pa.list_(turn))}), path)
    else:
        write_lines(path, [{"messages": turns} for turns in CHAT])


@pytest.mark.parametrize("form", ["in.csv", "texts.parquet", "bytes.parquet", "maps.parquet"])
def test_turns_are_read_as_programs_keep_them(tmp_path, form):
    found = []
    for name in (form, "in.jsonl"):
        (tmp_path / f"{name}.out").mkdir()
        written_as(name, tmp_path / name)
        run(tmp_path / name, tmp_path / f"{name}.out/out", handler="chat")
        found.append(outputs(tmp_path / f"{name}.out"))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[{'role': 'user', 'content': 'a'}]", "is a Python list as text, as pandas writes it"),
        ('[{"role": "user"', "expected JSON, got str"),
        ('{"role": "user"}', "expected a list, got str"),
    ],
)
def test_a_text_that_holds_no_turns_is_a_sentence(tmp_path, text, sentence):
    source = write_lines(tmp_path / "in.jsonl", [{"messages": text}])
    with pytest.raises(DataError, match=sentence):
        run(source, tmp_path / "out", handler="chat")
