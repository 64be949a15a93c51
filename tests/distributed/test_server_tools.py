"""Tool calls of a server, asked by OpenAI's own client, at several parallel sizes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.chain_model import CALL, write_chain_model
from tests.support.ranks import RankPool
from tests.support.server import (
    AT_ALL_SIZES,
    CLOCK,
    HI,
    WEATHER,
    Asking,
    ask_at,
    say,
    write_served_model,
)

pytestmark = pytest.mark.dist

NAMED = {"type": "function", "function": {"name": "clock"}}


def gathered(stream: Iterator[Any]) -> dict[str, Any]:
    """Puts the deltas of a stream together, as clients do."""
    text, finish, calls = "", None, {}
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or ():
                if call.index not in calls:
                    assert call.id
                    assert call.type == "function"
                    calls[call.index] = [call.function.name, ""]
                calls[call.index][1] += call.function.arguments
    return {
        "text": text,
        "finish": finish,
        "calls": [(index, *call) for index, call in calls.items()],
    }


def must_call(ask: Asking) -> Any:
    tools = {"tools": [WEATHER, CLOCK], "max_tokens": 60}
    named = say(ask, **tools, tool_choice=NAMED).choices[0]
    assert [call.function.name for call in named.message.tool_calls] == ["clock"]
    only = {"tools": [WEATHER], "max_tokens": 60, "tool_choice": "required"}
    choice = say(ask, **only).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("北京", "上海")
    assert arguments.get("days", 1) in (1, 2)
    assert arguments.get("where", "in") in ("in", "out")
    streamed = gathered(say(ask, **only, stream=True))
    assert streamed["calls"] == [(0, call.function.name, call.function.arguments)]
    assert streamed["finish"] == "tool_calls"
    # The form before there were tools: the same call, in the older form of an answer.
    older = {"functions": [WEATHER["function"], CLOCK["function"]], "max_tokens": 60}
    only_clock = {**older, "function_call": {"name": "clock"}}
    choice = say(ask, **only_clock).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("function_call", None)
    function = named.message.tool_calls[0].function.to_dict()
    assert choice.message.function_call.to_dict() == function
    deltas = [one for chunk in say(ask, **only_clock, stream=True) for one in chunk.choices]
    called = [one.delta.function_call for one in deltas if one.delta.function_call]
    assert [one.to_dict() for one in called] == [function]
    assert deltas[-1].finish_reason == "function_call"
    ids = [
        httpx.post(f"{ask.url}/tokenize", json={"messages": HI, **form}).json()["tokens"]
        for form in ({"tools": [CLOCK]}, {"functions": [CLOCK["function"]]}, {})
    ]
    assert ids[0] == ids[1] != ids[2]
    for wrong in ({"functions": [], "function_call": {"name": "x"}}, {**older, "tools": [CLOCK]}):
        with pytest.raises(openai.BadRequestError, match="functions"):
            say(ask, **wrong)
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        say(ask, tools=[CLOCK], tool_choice={"type": "function", "function": {"name": "x"}})
    nowhere = {"properties": {"a": {"$ref": "#/$defs/x"}}}
    lost = {"type": "function", "function": {"name": "f", "parameters": nowhere}}
    with pytest.raises(openai.BadRequestError, match=r"Pointer '/\$defs/x' does not exist"):
        say(ask, tools=[lost], tool_choice="required")
    with pytest.raises(openai.BadRequestError, match="two tools"):
        say(ask, tools=[CLOCK, CLOCK])
    none = say(ask, tools=[CLOCK], tool_choice="none")
    assert none.choices[0].message.tool_calls is None
    return arguments


FOUND: dict[str, Any] = {}


@AT_ALL_SIZES
def test_calls_that_must_come(ranks: RankPool, tmp_path: Path, sizes: str) -> None:
    found = ask_at(ranks, sizes, must_call, write_served_model(tmp_path))
    assert FOUND.setdefault("first", found) == found


def call_tools(ask: Asking) -> Any:
    tools = {"tools": [WEATHER], "max_tokens": 50}
    choice = say(ask, **tools).choices[0]
    streamed = gathered(say(ask, **tools, stream=True))
    calls = choice.message.tool_calls or []
    assert streamed["calls"] == [
        (index, call.function.name, call.function.arguments) for index, call in enumerate(calls)
    ]
    assert streamed["text"] == (choice.message.content or "")
    assert streamed["finish"] == choice.finish_reason
    assert all(call.id.startswith("call_") for call in calls)
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": '{"sun": true}'} for call in calls
    ]
    if results:  # a client sends back what it has got, and what came of it
        turns = [*HI, choice.message.to_dict(), *results]
        assert say(ask, **tools, messages=turns).choices[0].message is not None
        alone = say(ask, **tools, parallel_tool_calls=False).choices[0]
        assert len(alone.message.tool_calls) == 1
    unasked = say(ask, max_tokens=50).choices[0]
    assert unasked.message.tool_calls is None
    other = say(ask, tools=[CLOCK], max_tokens=50).choices[0]
    assert other.message.tool_calls is None
    assert other.message.content == unasked.message.content
    found = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
    return found, choice.message.content, choice.finish_reason, unasked.message.content


CALLED = ("get_weather", {"city": "北京", "days": 3})
LINES = ("get_weather", "\n```python\n", "tool_call(\n  city='北京',\n", "  days=3)", "\n```")
BROKEN = ("get_weather", "\n```python\n", "tool_call(city=", "\n```")
TWICE = (*CALL[:3], "\ntool_call(city='湖')", "\n```")


@AT_ALL_SIZES
@pytest.mark.parametrize(
    ("name", "pieces", "calls", "text"),
    [
        ("one", CALL, [CALLED], None),
        ("lines", LINES, [CALLED], None),
        ("twice", TWICE, [CALLED, ("get_weather", {"city": "湖"})], None),
        ("broken", BROKEN, [], "".join(BROKEN)),
    ],
)
def test_tool_calls(
    ranks: RankPool,
    tmp_path: Path,
    name: str,
    pieces: tuple[str, ...],
    calls: list[Any],
    text: str | None,
    sizes: str,
) -> None:
    chain = write_chain_model(tmp_path / name, *pieces, "<|observation|>")
    found, said, finish, unasked = ask_at(ranks, sizes, call_tools, chain)
    assert (found, said) == (calls, text)
    assert finish == ("tool_calls" if calls else "stop")
    assert unasked == "".join(pieces)
