"""`glm3 generate --serve`, asked by OpenAI's own client, at several parallel sizes."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from glm3cli.checkpoint.convert.random_model import write_random_model
from glm3cli.checkpoint.random import RandomSource
from glm3cli.demo import content
from tests.support.adapters import adapter_tensors, write_adapter
from tests.support.chain_model import CALL, ENDLESS, write_chain_model
from tests.support.ranks import RankPool
from tests.support.server import Asking, serve_for

pytestmark = pytest.mark.dist

SIZES: dict[str, tuple[int, dict[str, int]]] = {
    "tp1 pp1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
}
HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "天气",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["北京", "上海"]},
                "days": {"type": "integer", "enum": [1, 2]},
                "where": {"$ref": "#/$defs/Where"},
            },
            "required": ["city"],
            "$defs": {"Where": {"enum": ["in", "out"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A model with random weights."""
    content.train_tokenizer(folder / "tokenizer")
    source = RandomSource(content.MODEL.model_copy(update={"seq_length": 2048}), seed=1, std=0.2)
    write_random_model(folder / "random", source, folder / "tokenizer")
    return folder / "random"


def texts(choices: list[Any]) -> list[str]:
    return [choice.text for choice in choices]


def say(ask: Asking, **fields: Any) -> Any:
    """An answer in a chat; greedy, and ten tokens long, unless fields say otherwise."""
    given = {"model": ask.model, "messages": HI, "max_tokens": 10, "temperature": 0, **fields}
    return ask.client.chat.completions.create(**given)


def complete(ask: Asking, prompt: Any, **fields: Any) -> Any:
    given = {"model": ask.model, "prompt": prompt, "max_tokens": 6, "temperature": 0, **fields}
    return ask.client.completions.create(**given)


def check_models(ask: Asking) -> Any:
    [found] = ask.client.models.list().data
    assert (found.id, found.object) == (ask.model, "model")
    assert ask.client.models.retrieve(ask.model).id == ask.model
    with pytest.raises(openai.NotFoundError) as caught:
        say(ask, model="gpt-4")
    assert caught.value.body["code"] == "model_not_found"
    assert httpx.get(f"{ask.url}/health").json() == {"status": "ok"}


def check_completions(ask: Asking) -> Any:
    one = complete(ask, "The lake")
    assert (one.object, one.choices[0].finish_reason) == ("text_completion", "length")
    ids = ask.tokenizer.encode("The lake")
    assert one.usage.to_dict() == {
        "prompt_tokens": len(ids) + 2,
        "completion_tokens": 6,
        "total_tokens": len(ids) + 8,
    }
    [text] = texts(one.choices)
    assert texts(complete(ask, ids).choices) == [text]
    assert texts(complete(ask, [*ask.tokenizer.prefix, *ids]).choices) == [text]
    both = complete(ask, ["The lake", "In winter"]).choices
    assert [choice.index for choice in both] == [0, 1]
    assert texts(both)[0] == text != texts(both)[1]
    assert texts(complete(ask, [ids, ids]).choices) == [text, text]
    assert texts(complete(ask, "The lake", echo=True).choices) == ["The lake" + text]
    return [text, texts(both)]


def check_streamed_completions(ask: Asking) -> Any:
    plain = complete(ask, ["The lake", "In winter"], n=2, temperature=1, seed=3)
    parts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for chunk in complete(ask, ["The lake", "In winter"], n=2, temperature=1, seed=3, stream=True):
        assert chunk.usage is None
        [choice] = chunk.choices
        parts[choice.index] = parts.get(choice.index, "") + choice.text
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert [parts[index] for index in range(4)] == texts(plain.choices)
    assert ends == dict.fromkeys(range(4), "length")
    return texts(plain.choices)


def check_seeds(ask: Asking) -> Any:
    """The same seed gives the same text, and one choice isn't like the other."""
    found = [texts(complete(ask, "A", n=3, seed=7, temperature=1).choices) for _ in range(2)]
    assert found[0] == found[1]
    assert len(set(found[0])) == 3
    others = {texts(complete(ask, "A", temperature=2, max_tokens=12).choices)[0] for _ in range(4)}
    assert len(others) > 1
    return found


def check_echoed_logprobs(ask: Asking) -> Any:
    """A prompt's tokens are scored as the engine scores them by itself."""
    ids = ask.tokenizer.encode("The lake is wet")
    for length in (0, 1):
        found = complete(ask, [ids, ids[:2]], echo=True, logprobs=1, max_tokens=length)
        for choice, own in zip(found.choices, (ids, ids[:2]), strict=True):
            logprobs = choice.logprobs
            assert len(logprobs.token_logprobs) == len(own) + length
            assert logprobs.token_logprobs[0] is None
            assert logprobs.top_logprobs[0] is None
            pairs = zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True)
            assert all(1 <= len(top) <= 2 and own in top.values() for own, top in pairs)
            assert all(max(top.values()) < 0 for top in logprobs.top_logprobs[1:])
            offsets = [0, *(len(ask.tokenizer.decode(own[: n + 1])) for n in range(len(own)))]
            assert logprobs.text_offset[: len(own)] == offsets[:-1]
    whole = found.choices[0].logprobs.token_logprobs
    # A text is as likely as its tokens one after the other, each as the first of an answer.
    step = complete(ask, ids[:3], logprobs=5, max_tokens=1, logit_bias={str(ids[3]): 100})
    assert step.choices[0].logprobs.token_logprobs[0] == pytest.approx(whole[3], abs=1e-4)
    [chunk, *_] = complete(ask, "The lake", echo=True, logprobs=0, max_tokens=1, stream=True)
    assert chunk.choices[0].text.startswith("The lake")
    assert chunk.choices[0].logprobs.token_logprobs[0] is None
    return [found.choices[0].text, [round(one, 3) for one in whole[1:]]]


def check_stops(ask: Asking) -> Any:
    whole = complete(ask, "The lake", max_tokens=20).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    before = whole[: whole.index(stop)]
    for given in (stop, [stop, "never there"]):
        found = complete(ask, "The lake", max_tokens=20, stop=given, logprobs=0).choices[0]
        assert (found.text, found.finish_reason) == (before, "stop")
        joined = "".join(found.logprobs.tokens)
        assert joined.startswith(before) or "bytes:" in joined
    chunks = [
        c.choices[0] for c in complete(ask, "The lake", max_tokens=20, stop=stop, stream=True)
    ]
    assert "".join(c.text for c in chunks) == before
    assert chunks[-1].finish_reason == "stop"
    return before


def check_biases_and_penalties(ask: Asking) -> Any:
    forced = ask.tokenizer.encode("lake")[-1]
    found = complete(ask, "A", logit_bias={str(forced): 100}, max_tokens=3, logprobs=0)
    assert found.choices[0].logprobs.tokens == ["lake".removeprefix("")] * 3 or (
        len(set(found.choices[0].logprobs.tokens)) == 1
    )
    fields = {"logit_bias": {str(forced): 6}, "max_tokens": 8, "logprobs": 0}
    plain = complete(ask, "A", **fields).choices[0].logprobs.tokens
    for penalty in ("presence_penalty", "frequency_penalty"):
        other = complete(ask, "A", **fields, **{penalty: 2.0}).choices[0].logprobs.tokens
        assert len(set(other)) >= len(set(plain))
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        complete(ask, "A", logit_bias={"999999": 1})
    return plain


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


def check_calls_that_must_come(ask: Asking) -> Any:
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
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        say(ask, tools=[CLOCK], tool_choice={"type": "function", "function": {"name": "x"}})
    with pytest.raises(openai.BadRequestError, match="two tools"):
        say(ask, tools=[CLOCK, CLOCK])
    none = say(ask, tools=[CLOCK], tool_choice="none")
    assert none.choices[0].message.tool_calls is None
    return arguments


def check_refusals(ask: Asking) -> Any:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "nobody", "content": ""}]}, "messages"),
        ({"messages": HI, "temperature": 3}, "temperature"),
        ({"messages": HI, "n": 0}, "n"),
        ({"messages": HI, "max_tokens": "5"}, "max_tokens"),
        ({"messages": HI, "tool_choice": "maybe"}, "tool_choice"),
        ({"messages": HI, "logit_bias": {"a": 1}}, "logit_bias"),
    ]
    for body, param in wrong:
        answer = httpx.post(f"{ask.url}/v1/chat/completions", json=body)
        assert answer.status_code == 400, body
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
    with pytest.raises(openai.BadRequestError) as caught:
        complete(ask, "A lake. " * 1000)
    assert caught.value.body["code"] == "context_length_exceeded"
    # What is wanted beyond the model's positions is cut off.
    ids = [5] * 2000
    assert complete(ask, ids, max_tokens=500).usage.completion_tokens == 2048 - 2002
    where = f"{ask.url}/v1/chat/completions"
    for status, answer in {
        404: httpx.get(f"{ask.url}/v2"),
        405: httpx.get(where),
        415: httpx.post(where, content=b"{}"),
        413: httpx.post(where, json={"messages": HI, "user": "x" * 2**23}),
        400: httpx.post(where, content=b"{", headers={"Content-Type": "application/json"}),
    }.items():
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def check_tokenizer(ask: Asking) -> Any:
    def post(path: str, **body: Any) -> Any:
        return httpx.post(f"{ask.url}/{path}", json=body).json()

    ids = ask.tokenizer.encode("湖 </s>")
    assert post("tokenize", prompt="湖 </s>", add_special_tokens=False)["tokens"] == ids
    whole = [*ask.tokenizer.prefix, *ids]
    assert post("tokenize", prompt="湖 </s>")["tokens"] == whole
    assert post("tokenize", prompt="</s>", add_special_tokens=False)["tokens"] == [2]
    assert post("detokenize", tokens=ids) == {"prompt": "湖 </s>"}
    chat = post("tokenize", messages=HI)["tokens"]
    assert chat[-1] == ask.tokenizer.special("<|assistant|>")


def check_metrics(ask: Asking) -> Any:
    text = httpx.get(f"{ask.url}/metrics").text
    assert 'glm3_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "glm3_running 0.0" in text
    assert "glm3_waiting 0.0" in text


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


def check_everything(ask: Asking) -> dict[str, Any]:
    checks = {name: check for name, check in globals().items() if name.startswith("check_")}
    del checks["check_everything"]
    return {name: check(ask) for name, check in checks.items()}


FOUND: dict[str, Any] = {}


@pytest.mark.parametrize(
    "sizes", [pytest.param(sizes, marks=[pytest.mark.slow] * (sizes == "tp2")) for sizes in SIZES]
)
def test_openai_client(ranks: RankPool, model: Path, sizes: str) -> None:
    count, options = SIZES[sizes]
    [found, *others] = ranks.run(count, serve_for, check_everything, model, options)
    assert others == [None] * (count - 1)
    # Numbers that are rounded may differ in their last digit.
    first = FOUND.setdefault("first", found)
    assert {name for name in first if json.dumps(first[name]) != json.dumps(found[name])} <= {
        "check_echoed_logprobs"
    }


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
AFTER_TEXT = ("\n", "I look.", "<|assistant|>")


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
    folder: Path,
    name: str,
    pieces: tuple[str, ...],
    calls: list[Any],
    text: str | None,
) -> None:
    chain = write_chain_model(folder / name, *pieces, "<|observation|>")
    [(found, said, finish, unasked)] = ranks.run(1, serve_for, call_tools, chain, {})
    assert (found, said) == (calls, text)
    assert finish == ("tool_calls" if calls else "stop")
    assert unasked == "".join(pieces)


def characters_are_whole(ask: Asking) -> list[str]:
    chunks = say(ask, stream=True)
    return [chunk.choices[0].delta.content or "" for chunk in chunks]


def test_no_half_characters(ranks: RankPool, folder: Path) -> None:
    pieces = ("<0xE6>", "<0xB9>", "<0x96>", "wide", "<0xF0>", "<0x9F>", "<0xA6>", "<0x86>")
    chain = write_chain_model(folder / "bytes", *pieces, "<|user|>")
    [found] = ranks.run(1, serve_for, characters_are_whole, chain, {})
    assert [one for one in found if one] == ["湖", "wide", "🦆"]


def crowd(ask: Asking) -> Any:
    """Fills all places and the queue, and leaves."""
    fields = {"max_tokens": 4000, "stream": True}
    streams = [say(ask, **fields) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    waiting = [say(ask, **fields) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as caught:
        say(ask)
    assert int(caught.value.response.headers["Retry-After"]) > 0
    with pytest.raises(openai.BadRequestError, match="4 answers"):
        say(ask, n=5)
    for stream in (streams[0], *waiting):
        stream.close()
    assert len(list(zip(streams[1], range(20), strict=False))) == 20
    assert say(ask).choices[0].finish_reason == "length"
    body = {"messages": HI, "max_tokens": 4000}
    with pytest.raises(httpx.ReadTimeout):  # nobody waits for a whole answer, either
        httpx.post(f"{ask.url}/v1/chat/completions", json=body, timeout=0.2)
    streams[1].close()
    for _ in range(100):
        text = httpx.get(f"{ask.url}/metrics").text
        if "glm3_running 0.0" in text and "glm3_waiting 0.0" in text:
            return True
    return False


@pytest.mark.parametrize("sizes", ["tp1 pp1", "pp2"])
def test_who_leaves_makes_room(ranks: RankPool, folder: Path, sizes: str) -> None:
    count, options = SIZES[sizes]
    chain = folder / "endless"
    if not chain.exists():
        write_chain_model(chain, *ENDLESS)
    given = {**options, "max_batch_size": 2, "max_queue": 2}
    assert ranks.run(count, serve_for, crowd, chain / "model", given)[0]


def late(ask: Asking) -> Any:
    with pytest.raises(openai.APIStatusError) as caught:
        say(ask, max_tokens=4000)
    assert caught.value.status_code == 408
    with pytest.raises(openai.APIError, match="isn't there after"):
        list(say(ask, max_tokens=4000, stream=True))
    with pytest.raises(openai.AuthenticationError):
        say(Asking(ask.url, ask.tokenizer, "wrong"))
    assert httpx.get(f"{ask.url}/v1/models").status_code == 401
    assert httpx.get(f"{ask.url}/health").status_code == 200
    asked = {"Origin": "https://a.b", "Access-Control-Request-Method": "POST"}
    allowed = httpx.options(f"{ask.url}/v1/models", headers=asked)
    return allowed.headers["access-control-allow-origin"]


def test_limits_and_keys(ranks: RankPool, folder: Path) -> None:
    chain = folder / "endless"
    if not chain.exists():
        write_chain_model(chain, *ENDLESS)
    keys = folder / "keys"
    keys.write_text("# ours\nfirst\nnone\n")
    options = {
        "request_timeout": 0.3,
        "api_key_file": keys,
        "allow_origin": ["https://a.b"],
        "served_model_name": "mine",
    }
    [found] = ranks.run(1, serve_for, late, chain / "model", options)
    assert found == "https://a.b"


def ask_adapters(ask: Asking) -> Any:
    assert [model.id for model in ask.client.models.list()] == ["random", "one", "two"]
    names = ("random", "one", "two")
    alone = {name: complete(ask, "The lake", model=name).choices[0].text for name in names}
    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(complete, ask, "The lake", model=name) for name in names * 4]
    for name, answer in zip(names * 4, asked, strict=True):
        assert answer.result().model == name
        assert answer.result().choices[0].text == alone[name]
    scored = {
        name: complete(ask, "The lake", model=name, echo=True, logprobs=0, max_tokens=0)
        .choices[0]
        .logprobs.token_logprobs[1]
        for name in names
    }
    assert len(set(scored.values())) == 3
    with pytest.raises(openai.NotFoundError, match="there is random, one, two"):
        complete(ask, "The lake", model="three")
    return [alone[name] for name in names]


def test_adapters_by_name(ranks: RankPool, tmp_path: Path, model: Path) -> None:
    shape = content.MODEL
    for name, sign in (("one", 1), ("two", -1)):
        tensors = adapter_tensors(model=shape)
        changed = {key: sign * one if "lora_B" in key else one for key, one in tensors.items()}
        write_adapter(tmp_path / name, changed)
    options = {"lora": [f"{name}={tmp_path / name}" for name in ("one", "two")]}
    [found] = ranks.run(1, serve_for, ask_adapters, model, options)
    assert len(set(found)) == 3
