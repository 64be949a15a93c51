"""A server on the ranks of a pool, and scenarios that ask it, which run on rank 0."""

import functools
import json
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest

from glm3cli.checkpoint.convert.random_model import write_random_model
from glm3cli.checkpoint.random import RandomSource
from glm3cli.config.inference import GenerateConfig
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.demo import content
from glm3cli.infer.serve.run import serve
from tests.support.ranks import RankPool

SIZES: dict[str, tuple[int, dict[str, int]]] = {
    "tp1 pp1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp2 dp2": (4, {"tp": 2}),
}
AT_ALL_SIZES = pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(sizes, marks=[] if sizes in ("tp1 pp1", "pp2") else [pytest.mark.slow])
        for sizes in SIZES
    ],
)
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


def write_served_model(folder: Path) -> Path:
    """Writes a model with random weights and 2,048 positions, and returns its folder."""
    content.train_tokenizer(folder / "tokenizer")
    source = RandomSource(content.MODEL.model_copy(update={"seq_length": 2048}), seed=1, std=0.2)
    write_random_model(folder / "random", source, folder / "tokenizer")
    return folder / "random"


class Asking:
    """Asks a server.

    Attributes:
        url: The URL of the server.
        tokenizer: The tokenizer of its model.
        folder: The folder in which the model's folder stands.
        client: OpenAI's own client, which tries nothing twice.
        model: The name of the model.
    """

    def __init__(self, url: str, tokenizer: Tokenizer, key: str = "none") -> None:
        self.url, self.tokenizer = url, tokenizer
        self.folder = tokenizer.path.parents[1]
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)

    @functools.cached_property
    def model(self) -> str:
        return self.client.models.list().data[0].id


def serve_for(scenario: Callable[[Asking], Any], model: Path, options: dict[str, Any]) -> Any:
    """Runs on a rank of a pool: serves until a scenario on rank 0 has ended; returns its result.

    The server ends as it does for its users, by SIGTERM.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def ask(url: str) -> None:
        asking = Asking(url, Tokenizer.load(model))
        try:
            with asking.client:
                results.append(scenario(asking))
        except BaseException as error:
            errors.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def begin(url: str) -> None:
        threading.Thread(target=ask, args=(url,)).start()

    given = {"model": model, "serve": "0", "device": "cpu", **options}
    serve(GenerateConfig.parse(given), begin)
    if errors:
        raise errors[0]
    return results[0] if results else None


def ask_at(
    ranks: RankPool, sizes: str, scenario: Callable[[Asking], Any], model: Path, **options: Any
) -> Any:
    """Serves at parallel sizes until a scenario has ended; returns its result."""
    count, given = SIZES[sizes]
    [found, *others] = ranks.run(count, serve_for, scenario, model, {**given, **options})
    assert others == [None] * (count - 1)
    return found


def run_checks(module: Mapping[str, Any], ask: Asking) -> dict[str, Any]:
    """Runs all functions of a module that begin with check_; returns their results by name."""
    return {name: one(ask) for name, one in module.items() if name.startswith("check_")}


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> set[str]:
    """Returns the names of the checks that have found something else."""
    return {name for name in first if json.dumps(first[name]) != json.dumps(second[name])}


def say(ask: Asking, **fields: Any) -> Any:
    """An answer in a chat; greedy, and ten tokens long, unless fields say otherwise."""
    given = {"model": ask.model, "messages": HI, "max_tokens": 10, "temperature": 0, **fields}
    return ask.client.chat.completions.create(**given)


def complete(ask: Asking, prompt: Any, **fields: Any) -> Any:
    given = {"model": ask.model, "prompt": prompt, "max_tokens": 6, "temperature": 0, **fields}
    return ask.client.completions.create(**given)
