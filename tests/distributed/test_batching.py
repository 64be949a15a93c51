"""Requests side by side: batches, chunks, shared beginnings, and rows that are used again.

Whatever runs beside a request, its greedy tokens are those of transformers alone. The logits differ
by roundings of sums in another order, 1e-6 of numbers around 5: only tokens that are as likely as
each other to six digits could change places, and the prompts here meet none.
"""

from typing import Any

import pytest
import torch

from glm3cli.config.parallel import ParallelConfig
from tests.distributed.test_engine import MODEL, random_source
from tests.support import reference
from tests.support.ranks import RankPool

pytestmark = pytest.mark.dist

SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1 pp1": (1, {}),
    "tp2 pp1": (2, {"tp": 2}),
    "tp1 pp2": (2, {"pp": 2}),
    "tp1 pp3": (3, {"pp": 3, "layers_per_stage": "2,1,1"}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "tp4 pp1": (4, {"tp": 4}),
}
LENGTHS = (9, 3, 12, 1, 7, 5)


def prompts(count: int, shared: int = 0) -> list[list[int]]:
    """Returns random prompts of 1 to 30 tokens, after `shared` tokens that are the same."""
    generator = torch.Generator().manual_seed(count)

    def draw(length: int) -> list[int]:
        return torch.randint(0, 128, (length,), generator=generator).tolist()

    beginning = draw(shared)
    return [[*beginning, *draw(1 + 7 * i % 30)] for i in range(count)]


def expected(asked: list[list[int]]) -> list[list[int]]:
    """Returns the greedy tokens of transformers' `generate` for each prompt alone."""
    glm = reference.build(MODEL, random_source(MODEL)).eval()
    glm.generation_config.eos_token_id = None
    found = []
    for index, prompt in enumerate(asked):
        ids = torch.tensor([prompt])
        length = LENGTHS[index % len(LENGTHS)]
        with torch.no_grad():
            whole = glm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=length,
                pad_token_id=0,
            )
        found.append(whole[0, len(prompt) :].tolist())
    return found


def answers(options: dict[str, Any], asked: list[list[int]], batch: int, chunk: int) -> Any:
    """Returns the tokens of requests that are all added at once, and how many tokens were read."""
    from glm3cli.infer.engine import Engine
    from glm3cli.infer.requests import Request
    from glm3cli.infer.sampling import Sampling
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig(**options)
    with open_grid(parallel) as grid:
        engine = Engine(random_source(MODEL), parallel, "fp32", grid, max_batch_size=batch)
        engine.batching.chunk = chunk
        pipeline, read = engine.batching._pipeline, []
        forward = pipeline.forward

        def counted(runs: Any, cache: Any, wanted: Any) -> Any:
            read.append(sum(len(run.tokens) for run in runs))
            assert len(runs) <= batch
            return forward(runs, cache, wanted)

        pipeline.forward = counted  # type: ignore[method-assign]
        requests = [
            Request(prompt, Sampling(), LENGTHS[index % len(LENGTHS)])
            for index, prompt in enumerate(asked)
        ]
        found = [one.token_ids for one in engine.answer(requests)]
        assert max(read) <= max(chunk, batch)
        return found, sum(read)


@pytest.mark.parametrize("sizes", SIZES)
def test_tokens_are_transformers_whatever_runs_beside_them(ranks: RankPool, sizes: str) -> None:
    """Four rows for 14 requests that end at different times, and prompts longer than a chunk."""
    world_size, options = SIZES[sizes]
    asked = prompts(14)
    for tokens, read in ranks.run(world_size, answers, options, asked, 4, 8):
        assert tokens == expected(asked)
        # Every token but the last of each request is read once, whatever the rest does.
        lengths = [LENGTHS[i % len(LENGTHS)] for i in range(len(asked))]
        assert read == sum(map(len, asked)) + sum(lengths) - len(asked)


def widths(options: dict[str, Any], batch: int) -> tuple[int, set[int]]:
    """Returns how many texts may run side by side, and how many each pass has continued."""
    from glm3cli.infer.engine import Engine
    from glm3cli.infer.requests import Request
    from glm3cli.infer.sampling import Sampling
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig(**options)
    with open_grid(parallel) as grid:
        engine = Engine(random_source(MODEL), parallel, "fp32", grid, max_batch_size=batch)
        pipeline, found = engine.batching._pipeline, set()
        forward = pipeline.forward

        def counted(runs: Any, cache: Any, wanted: Any) -> Any:
            if all(len(run.tokens) == 1 for run in runs):
                found.add(len(runs))
            return forward(runs, cache, wanted)

        pipeline.forward = counted  # type: ignore[method-assign]
        engine.answer([Request([5, 6, 7 + n], Sampling(), 8) for n in range(engine.capacity)])
        return engine.capacity, found


@pytest.mark.parametrize("sizes", ["tp1 pp1", "tp1 pp2"])
def test_each_stage_continues_a_whole_batch(ranks: RankPool, sizes: str) -> None:
    world_size, options = SIZES[sizes]
    for capacity, found in ranks.run(world_size, widths, options, 3):
        assert capacity == 3 * options.get("pp", 1)
        assert found == {3}


@pytest.mark.parametrize("sizes", ["tp1 pp1", "tp2 pp2"])
def test_a_shared_beginning_is_read_once(ranks: RankPool, sizes: str) -> None:
    world_size, options = SIZES[sizes]
    asked = prompts(9, shared=40)
    for tokens, read in ranks.run(world_size, answers, options, asked, 4, 64):
        assert tokens == expected(asked)
        lengths = [LENGTHS[i % len(LENGTHS)] for i in range(len(asked))]
        alone = sum(map(len, asked)) + sum(lengths) - len(asked)
        assert read == alone - (len(asked) - 1) * 40


def turns() -> dict[str, Any]:
    """Continues a text, then the same with its continuation and more, as a chat does."""
    from glm3cli.infer.engine import Engine
    from glm3cli.infer.sampling import Sampling
    from glm3cli.parallel.groups import open_grid

    with open_grid(ParallelConfig()) as grid:
        engine = Engine(random_source(MODEL), ParallelConfig(), "fp32", grid)
        first = prompts(1, shared=30)[0]
        [said] = engine.generate([first], Sampling(), 8, [])
        second = [*first, *said.token_ids, 5, 6, 7]
        [reused] = engine.generate([second], Sampling(), 8, [])
        rows = engine.batching.lanes[0].cache.num_rows
        engine.batching.lanes[0].forget()
        [read] = engine.generate([second], Sampling(), 8, [])
        slots = engine.batching.lanes[0].cache.slots
        return {
            "reused": reused,
            "read": read,
            "rows": rows,
            "bytes": slots.numel() * slots.element_size(),
            "slots": slots.size(2) * slots.size(4),
        }


def test_a_later_turn_goes_on_in_the_row_of_the_turn_before(ranks: RankPool) -> None:
    [found] = ranks.run(1, turns)
    assert found["reused"].token_ids == found["read"].token_ids
    assert found["reused"].logprobs == pytest.approx(found["read"].logprobs, abs=1e-5)
    assert found["rows"] == 1
    # 2 x layers x groups x kv_channels x bytes x slots
    assert found["bytes"] == 2 * 4 * 2 * 16 * 4 * found["slots"]
    assert found["slots"] == 64


WIDE = {**SIZES, "dp2": (2, {})}
WAYS: dict[str, tuple[int, int]] = {  # rows side by side, and tokens of a chunk
    "one by one": (1, 1024),
    "16 side by side": (16, 1024),
    "16 side by side, in chunks": (16, 7),
}


def shares(options: dict[str, Any], asked: list[list[int]], batch: int, chunk: int) -> Any:
    """Returns the tokens of this rank's share of the prompts, with the number of the first."""
    from glm3cli.infer.engine import Engine
    from glm3cli.infer.requests import Request
    from glm3cli.infer.sampling import Sampling
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig(**options)
    with open_grid(parallel) as grid:
        engine = Engine(random_source(MODEL), parallel, "fp32", grid, max_batch_size=batch)
        engine.batching.chunk = chunk
        first = grid.dp_rank * len(asked) // grid.dp_size
        last = (grid.dp_rank + 1) * len(asked) // grid.dp_size
        requests = [
            Request(asked[index], Sampling(), LENGTHS[index % len(LENGTHS)])
            for index in range(first, last)
        ]
        return first, [one.token_ids for one in engine.answer(requests)]


@pytest.fixture(scope="module")
def asked_200() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of which a half share a beginning, and transformers' tokens for each alone."""
    asked = [*prompts(100), *prompts(100, shared=24)]
    return asked, expected(asked)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", WIDE)
def test_200_prompts_are_transformers(
    ranks: RankPool, asked_200: tuple[Any, Any], sizes: str, way: str
) -> None:
    asked, tokens = asked_200
    world_size, options = WIDE[sizes]
    for first, found in ranks.run(world_size, shares, options, asked, *WAYS[way]):
        assert found == tokens[first : first + len(found)]


def rounded(options: dict[str, int], bits: int | None) -> tuple[Any, list[list[int]]]:
    """Returns the logits of some prompts, and their greedy tokens, of a model in few bits."""
    from glm3cli.infer.engine import Engine
    from glm3cli.infer.sampling import Sampling
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig(**options)
    with open_grid(parallel) as grid:
        engine = Engine(random_source(MODEL), parallel, "fp32", grid, bits=bits)
        found = engine.generate(prompts(4), Sampling(), 4, [])
        return engine.all_logits([prompts(4)[3]]), [one.token_ids for one in found]


@pytest.mark.parametrize("sizes", ["tp1 pp1", "tp2 pp2"])
def test_few_bits_change_logits_little(ranks: RankPool, sizes: str) -> None:
    """Random weights lose more than trained ones: 8 bits 0.8 % of each product, 4 bits 10 %.

    Some ten products follow each other, of errors of random sign.
    """
    world_size, options = SIZES[sizes]
    [(exact, _)] = ranks.run(1, rounded, {}, None)
    for bits, most in {8: 0.05, 4: 0.5}.items():
        answers = ranks.run(world_size, rounded, options, bits)
        assert all(tokens == answers[0][1] for _, tokens in answers)
        for logits, _ in answers:
            if logits is not None:
                assert 0.001 < (logits - exact).norm() / exact.norm() < most
