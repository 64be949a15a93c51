"""A request whose numbers become NaN ends alone, and leaves nothing of them behind."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

import glm3cli
from glm3cli.checkpoint.convert.random_model import write_random_model
from glm3cli.checkpoint.random import RandomSource
from glm3cli.demo import content
from glm3cli.errors import CheckpointError
from glm3cli.infer.decoding.beams import Beams
from glm3cli.infer.model import GREEDY
from glm3cli.infer.requests import Request
from tests.support.ranks import RankPool
from tests.support.server import Asking, ask_at, complete

pytestmark = pytest.mark.dist

BAD = 700  # the token whose embedding is NaN
GOOD = [[300, 301, 302, 303], [310, 311], [320, 321, 322]]
LONG = [*range(400, 430)]
SPOILED = [*range(500, 510), BAD, *range(510, 520)]
SAID = "the model's logits are NaN"


class SpoiledSource(RandomSource):
    """Random weights of which one token's embedding is NaN."""

    def read(self, weight: Any, layer: int | None = None) -> torch.Tensor:
        tensor = super().read(weight, layer)
        if weight.logical == "embedding":
            tensor[BAD] = torch.nan
        return tensor


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoiled")
    content.train_tokenizer(folder / "tokenizer")
    write_random_model(
        folder / "model", SpoiledSource(content.MODEL, seed=1, std=0.2), folder / "tokenizer"
    )
    return folder / "model"


def ask_beside_it(ask: Asking) -> Any:
    def said(prompts: list[list[int]]) -> list[str]:
        return [one.text for one in complete(ask, prompts, logit_bias={str(BAD): -100}).choices]

    alone = [said([prompt])[0] for prompt in (*GOOD, LONG)]
    for fields in ({}, {"temperature": 1}, {"echo": True, "logprobs": 1, "max_tokens": 0}):
        with pytest.raises(openai.InternalServerError, match=SAID):
            complete(ask, SPOILED, **fields)
    body = {"prompt": SPOILED, "stream": True}
    assert SAID in httpx.post(f"{ask.url}/v1/completions", json=body).text
    # Each of the rows that were spoiled is used again, beside a longer text.
    assert said([*GOOD, LONG]) == alone
    return alone


@pytest.mark.parametrize("sizes", ["tp1 pp1", "pp2"])
def test_a_server_goes_on(ranks: RankPool, spoiled: Path, sizes: str) -> None:
    ask_at(ranks, sizes, ask_beside_it, spoiled, max_batch_size=4)


def ask_the_engine(folder: Path) -> None:
    """Spoils the rows of an engine by requests that raise; runs on a rank of the pool."""
    from glm3cli.infer.serve.orders import Score
    from glm3cli.infer.serve.work import Worker

    prompts = [*GOOD, LONG]
    with glm3cli.open_model(folder, device="cpu") as model:
        alone = [model.continue_ids([prompt], 6)[0].token_ids for prompt in prompts]
        for beams in (None, Beams(3)):
            spoiled = [Request(SPOILED[n:], GREEDY, 6, beams=beams) for n in range(2)]
            with pytest.raises(CheckpointError, match=SAID):
                model.engine.answer([*spoiled, Request(LONG, GREEDY, 6)])
            assert [one.token_ids for one in model.continue_ids(prompts, 6)] == alone
        updates = Worker(model).work([Score(n, row, 0) for n, row in enumerate([SPOILED, LONG])])
        assert [update.problem for update in updates] == [SAID, ""]
        assert len(updates[1].tokens) == len(LONG)


def test_a_program_goes_on(ranks: RankPool, spoiled: Path) -> None:
    ranks.run(1, ask_the_engine, spoiled)
