"""`glm3 generate --serve`, asked by OpenAI's own client, at several parallel sizes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from glm3cli.demo import content
from glm3cli.infer.serve.reading import most_bytes
from tests.support.adapters import adapter_tensors, write_adapter
from tests.support.ranks import RankPool
from tests.support.server import (
    AT_ALL_SIZES,
    HI,
    Asking,
    ask_at,
    complete,
    differing,
    run_checks,
    say,
    write_served_model,
)

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("server"))


def texts(choices: list[Any]) -> list[str]:
    return [choice.text for choice in choices]


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
    assert most_bytes(2**20) == 2**24  # a prompt of as many tokens gets through
    packed = httpx.post(
        where, content=b"{}", headers={"Content-Type": "application/json", "Content-Encoding": "br"}
    )
    assert packed.status_code == 415
    assert "without Content-Encoding: br" in packed.json()["error"]["message"]


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
    assert 'glm3_requests_total{path="/v1/completions",status="200"}' in text
    assert "glm3_running 0.0" in text
    assert "glm3_waiting 0.0" in text


def everything(ask: Asking) -> dict[str, Any]:
    return run_checks(globals(), ask)


FOUND: dict[str, Any] = {}


@AT_ALL_SIZES
def test_models_and_completions(ranks: RankPool, model: Path, sizes: str) -> None:
    found = ask_at(ranks, sizes, everything, model)
    # Numbers that are rounded may differ in their last digit.
    assert differing(FOUND.setdefault("first", found), found) <= {"check_echoed_logprobs"}


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
    found = ask_at(ranks, "tp1 pp1", ask_adapters, model, **options)
    assert len(set(found)) == 3
