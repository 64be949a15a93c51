"""A server that is asked too much: places, the queue, clients that leave, limits and keys."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from glm3cli.config.inference import GenerateConfig
from glm3cli.infer.serve.run import serve
from tests.support.chain_model import ENDLESS, write_chain_model
from tests.support.ranks import RankPool
from tests.support.server import HI, Asking, ask_at, say

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers have no end."""
    return write_chain_model(tmp_path_factory.mktemp("server") / "endless", *ENDLESS)


def crowd(ask: Asking) -> Any:
    """Fills both places and the queue of two, and leaves."""
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


@pytest.mark.parametrize(("sizes", "batch"), [("tp1 pp1", 2), ("pp2", 1)])
def test_who_leaves_makes_room(ranks: RankPool, endless: Path, sizes: str, batch: int) -> None:
    assert ask_at(ranks, sizes, crowd, endless, max_batch_size=batch, max_queue=2)


def under_way(ask: Asking) -> list[int]:
    """Returns the number of answers in each copy of the model."""
    text = httpx.get(f"{ask.url}/metrics").text
    return [int(found) for found in re.findall(r'glm3_under_way\{copy="\d+"\} (\d+)\.0', text)]


def wait_for(ask: Asking, loads: list[int]) -> None:
    """Waits until so many answers are under way in each copy."""
    for _ in range(1000):
        if under_way(ask) == loads:
            return
    raise AssertionError(f"{under_way(ask)} are under way, not {loads}")


def share_out(ask: Asking) -> Any:
    """Begins four answers, ends some of them, and asks for more."""
    seen = [under_way(ask)]

    def begin(stack: ExitStack) -> Iterator[Any]:
        stream = stack.enter_context(say(ask, max_tokens=1500, stream=True))
        next(iter(stream))
        seen.append(under_way(ask))
        return stream

    with ExitStack() as all_of_them:
        streams = [begin(all_of_them) for _ in range(4)]
        texts = ["".join(c.choices[0].delta.content or "" for c in one) for one in streams]
    assert texts == [texts[0]] * 4
    with ExitStack() as first, ExitStack() as second:
        for one in (first, second, first, second):
            begin(one)
        first.close()  # clients that leave
        wait_for(ask, [0, 2])
        begin(second)
    wait_for(ask, [0, 0])
    return seen


def test_copies_share_what_is_asked(ranks: RankPool, endless: Path) -> None:
    """Each answer goes where the fewest are under way; a client that leaves makes room there."""
    seen = ask_at(ranks, "dp2", share_out, endless)
    assert seen[:5] == [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2]]
    assert seen[5:] == [[1, 0], [1, 1], [2, 1], [2, 2], [1, 2]]


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


def test_limits_and_keys(ranks: RankPool, endless: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst\nnone\n")
    options = {
        "request_timeout": 0.3,
        "api_key_file": keys,
        "allow_origin": ["https://a.b"],
        "served_model_name": "mine",
    }
    assert ask_at(ranks, "tp1 pp1", late, endless, **options) == "https://a.b"


def serve_with_signals_elsewhere(model: Path) -> str:
    """Serves on a rank whose main thread isn't woken by signals, and is stopped by one."""

    def begin(url: str) -> None:
        def stop() -> None:
            found.append(httpx.get(f"{url}/health").json()["status"])
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=stop).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    found: list[str] = []
    try:
        serve(GenerateConfig.parse({"model": model, "serve": "0", "device": "cpu"}), begin)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    return found[0]


def test_a_signal_needs_no_free_main_thread(ranks: RankPool, endless: Path) -> None:
    assert ranks.run(1, serve_with_signals_elsewhere, endless) == ["ok"]
