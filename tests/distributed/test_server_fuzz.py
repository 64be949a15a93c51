"""Whatever is sent to a server, it refuses with a sentence or answers, and goes on."""

import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.chain_model import write_chain_model
from tests.support.ranks import RankPool
from tests.support.server import CLOCK, HI, WEATHER, Asking, say, serve_for

pytestmark = [pytest.mark.dist, pytest.mark.slow]

_PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
_GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "prompt": "湖 a",
        "max_tokens": 2,
        "n": 2,
        "logprobs": 1,
        "echo": True,
        "stop": ["x"],
        "logit_bias": {"5": 1},
        "seed": 1,
        "temperature": 0.5,
    },
    "/v1/chat/completions": {
        "messages": [
            *HI,
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {
                "name": "clock", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "12"},
        ],
        "max_completion_tokens": 2,
        "tools": [WEATHER, CLOCK],
        "tool_choice": "required",
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {
            "type": "object", "properties": {"a": {"type": "string"}}}}},
        "logprobs": True,
        "top_logprobs": 2,
        "stream_options": {"include_usage": True},
        "stream": True,
    },
    "/tokenize": {"prompt": "a", "add_special_tokens": True},
    "/detokenize": {"tokens": [5, 6]},
}  # fmt: skip
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -0.5, 1e308, float("nan"), float("inf"),
    "", "a", "\x00", "湖", "\ud800", "a" * 5000, [], [[]], [None], [1], [-1], ["a", 1], {},
    {"a": 1}, {"type": "function"}, {"$ref": "#"}, [{}], [[1], "a"], {"": {"": {}}},
)  # fmt: skip


def broken(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value in which something is otherwise."""
    if draw.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return draw.choice(_ODD)
    if isinstance(value, list):
        found = list(value)
        place = draw.randrange(len(found))
        found[place] = broken(found[place], draw)
        return found
    copy = dict(value)
    key = draw.choice(list(copy))
    match draw.randrange(4):
        case 0:
            del copy[key]
        case 1:
            copy[draw.choice([*copy, "functions", "suffix", "best_of", "\ud800"])] = draw.choice(
                _ODD
            )
        case _:
            copy[key] = broken(copy[key], draw)
    return copy


def bodies(count: int) -> Iterator[tuple[str, bytes]]:
    """Yields addresses, and what is sent there."""
    draw = random.Random(5)
    for _ in range(count):
        path = draw.choice(_PATHS)
        value = broken(_GOOD[path], draw)
        for _ in range(draw.randrange(3)):
            value = broken(value, draw)
        data = json.dumps(value).encode()
        match draw.randrange(8):
            case 0:
                data = data[: draw.randrange(len(data) + 1)]
            case 1:
                place = draw.randrange(len(data) + 1)
                data = data[:place] + bytes([draw.randrange(256)]) + data[place:]
            case 2:
                data = draw.choice([b"", b"[" * 50_000, b'{"a":' * 50_000, b"\xff\xfe", b"1e999"])
        yield path, data


def send_broken_bodies(ask: Asking) -> dict[int, int]:
    statuses: dict[int, int] = {}
    before = say(ask).choices[0].message.content
    with httpx.Client(base_url=ask.url, timeout=30) as client:
        for path, data in bodies(2000):
            answer = client.post(path, content=data, headers={"Content-Type": "application/json"})
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            if answer.status_code != 200:
                assert 400 <= answer.status_code < 500, (path, data[:500], answer.text)
                error = answer.json()["error"]
                assert error.keys() == {"message", "type", "param", "code"}
                assert error["message"]
            elif answer.headers["content-type"].startswith("text/event-stream"):
                assert answer.text.endswith("data: [DONE]\n\n")
                assert '"error"' not in answer.text, (data[:500], answer.text)
            else:
                answer.json()
        for _ in range(50):  # what isn't HTTP at all
            draw = random.Random(1)
            name = "".join(draw.choices(string.ascii_letters, k=9))
            assert client.request(name[:3], f"/{name}").status_code in (404, 405)
    assert say(ask).choices[0].message.content == before
    return statuses


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "speaker"
    return write_chain_model(folder, "\n", "北京", " is", " cold", "<|user|>")


def test_broken_bodies(ranks: RankPool, speaker: Path) -> None:
    [statuses] = ranks.run(1, serve_for, send_broken_bodies, speaker, {})
    assert statuses[400] > 1000
    assert statuses[200] > 50


def follow_the_description(ask: Asking) -> int:
    """Sends what the OpenAPI document allows, and what it doesn't."""
    import hypothesis
    import schemathesis

    # A schema can't say all that makes sense, such as which roles there are.
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(f"{ask.url}/openapi.json")
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=60,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def send(case: Any) -> None:
            nonlocal count
            count += 1
            case.call_and_validate(timeout=30, excluded_checks=[positive_data_acceptance])

        send()
    for path, body in (
        ("/v1/completions", {"prompt": "a", "max_tokens": 3, "stream": True}),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 3, "stream": True}),
    ):
        schema[path]["POST"].Case(body=body).call_and_validate(timeout=30)
    assert say(ask).choices[0].message.content
    return count


def test_the_openapi_document(ranks: RankPool, speaker: Path) -> None:
    [count] = ranks.run(1, serve_for, follow_the_description, speaker, {})
    assert count > 200
