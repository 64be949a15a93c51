"""A server's chats, asked by OpenAI's own client, at several parallel sizes."""

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.chain_model import write_chain_model
from tests.support.ranks import RankPool
from tests.support.server import (
    AT_ALL_SIZES,
    HI,
    Asking,
    ask_at,
    differing,
    run_checks,
    say,
    write_served_model,
)

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("server"))


def check_streamed_chat(ask: Asking) -> Any:
    plain = say(ask)
    assert plain.choices[0].message.role == "assistant"
    options = {"include_usage": True}
    chunks = list(say(ask, stream=True, stream_options=options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(not chunk.choices[0].delta.role for chunk in chunks[1:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == plain.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason
    assert all(chunk.choices for chunk in say(ask, stream=True))
    raw = httpx.post(f"{ask.url}/v1/chat/completions", json={"messages": HI, "stream": True})
    assert raw.text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in raw.text
    return text


def check_ways_to_say_the_same(ask: Asking) -> Any:
    text = say(ask).choices[0].message.content
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    same: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": parts}]},
        {"max_completion_tokens": 10, "max_tokens": openai.omit},
        {"user": "me", "store": False, "metadata": {"a": "b"}, "extra_body": {"unknown": [1]}},
        {"response_format": {"type": "text"}, "tools": openai.omit},
        {"temperature": 1e-9},
        {"temperature": 1, "top_p": 0},
        {"temperature": 1, "extra_body": {"top_k": 1}},
    ]
    for fields in same:
        assert say(ask, **fields).choices[0].message.content == text, fields
    system = [{"role": "system", "content": "Be kind."}, *HI]
    developer = [{"role": "developer", "content": "Be kind."}, *HI]
    kind = [say(ask, messages=turns).choices[0].message.content for turns in (system, developer)]
    assert kind[0] == kind[1] != text
    return [text, kind[0]]


def check_chat_logprobs(ask: Asking) -> Any:
    found = say(ask, logprobs=True, top_logprobs=3, n=2, seed=1, temperature=1)
    for choice in found.choices:
        entries = choice.logprobs.content
        assert len(entries) == 10
        for entry in entries:
            assert len(entry.top_logprobs) == 3
            assert entry.logprob <= entry.top_logprobs[0].logprob + 1e-6 < 1e-6
        data = b"".join(bytes(entry.bytes) for entry in entries if not entry.token.startswith("["))
        assert (
            choice.message.content.strip() in data.decode(errors="replace").replace("\ufffd", "")
            or "\ufffd" in choice.message.content
        )
    streamed = say(ask, logprobs=True, stream=True)
    logprobs = [c.choices[0].logprobs for c in streamed]
    assert sum(len(one.content) for one in logprobs if one) == 10
    assert say(ask).choices[0].logprobs is None


def check_formats(ask: Asking) -> Any:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x y", "湖"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    answer = say(ask, response_format=wanted, max_tokens=80)
    value = json.loads(answer.choices[0].message.content)
    assert value["a"] in ("x y", "湖")
    assert isinstance(value["b"], bool)
    chunks = say(ask, response_format=wanted, max_tokens=80, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    some = say(ask, response_format={"type": "json_object"}, max_tokens=3)
    assert some.choices[0].message.content.lstrip().startswith("{")
    for wrong in ({"type": "xml"}, {"type": "json_schema"}):
        with pytest.raises(openai.BadRequestError):
            say(ask, response_format=wrong)
    bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        say(ask, response_format=bad)
    assert caught.value.body["param"] == "response_format"
    return value


def everything(ask: Asking) -> dict[str, Any]:
    return run_checks(globals(), ask)


FOUND: dict[str, Any] = {}


@AT_ALL_SIZES
def test_chats(ranks: RankPool, model: Path, sizes: str) -> None:
    found = ask_at(ranks, sizes, everything, model)
    assert differing(FOUND.setdefault("first", found), found) == set()


def characters_are_whole(ask: Asking) -> list[str]:
    chunks = say(ask, stream=True)
    return [chunk.choices[0].delta.content or "" for chunk in chunks]


def test_no_half_characters(ranks: RankPool, tmp_path: Path) -> None:
    pieces = ("<0xE6>", "<0xB9>", "<0x96>", "wide", "<0xF0>", "<0x9F>", "<0xA6>", "<0x86>")
    chain = write_chain_model(tmp_path / "bytes", *pieces, "<|user|>")
    found = ask_at(ranks, "tp1 pp1", characters_are_whole, chain)
    assert [one for one in found if one] == ["湖", "wide", "🦆"]
