"""Decoding by captured steps, on an emulation that repeats what was captured and nothing else.

A number of the host that changes from token to token, a read of the host, or a tensor that isn't
where it was gives other tokens than those of the CPU, or is refused.
"""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from glm3cli.config.parallel import ParallelConfig
from glm3cli.infer.decoding.beams import Beams
from glm3cli.infer.requests import Request
from glm3cli.infer.sampling import Sampling
from tests.distributed.test_adapted_engine import random_adapter
from tests.distributed.test_engine import HOT, MODEL, random_source
from tests.support.ranks import RankPool
from tests.support.tiny import TINY
from tests.support.training import first_source

pytestmark = pytest.mark.dist

LONG = [7 * place % 128 for place in range(130)]
SHARED = LONG[50:80]


def requests() -> list[Request]:
    """More than fit side by side; one crosses the length of 64 slots, one makes all rows longer."""
    greedy, picky = Sampling(), Sampling(repetition_penalty=1.3)
    return [
        Request([7, 3, 99], greedy, 12),
        Request(LONG[:60], greedy, 10),
        Request([5], HOT, 9, seed=5),
        Request([*SHARED, 1], greedy, 3),
        Request([*SHARED, 2, 4], HOT, 7, seed=6),
        Request([11, 12, 13], greedy, 6, beams=Beams(2)),
        Request([64, 65], picky, 8, stop_ids=range(0, 128, 9), logprobs=3),
        Request(LONG, greedy, 4),
        Request([1, 2], greedy, 12, lookup=2),
        Request([*SHARED, 1, 9], greedy, 5),
    ]


def answers(
    options: dict[str, int], dtype: Any, left_out: tuple[str, ...] = (), kind: str = "plain"
) -> tuple[list[list[int]], list[float], int]:
    """Returns the tokens of the requests, all log-probabilities, and the number of replays.

    Args:
        options: The parallel sizes.
        dtype: The type of the weights.
        left_out: The kernels that aren't used.
        kind: What linear layers are: `plain`, `int4`, or with an `adapter`.
    """
    from glm3cli.device import require_active
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    device, parallel = require_active(), ParallelConfig(**options)
    device.leave_out(left_out)
    card = getattr(device, "card", None)
    settings: dict[str, Any] = {"bits": 4 if kind == "int4" else None}
    source = random_source(MODEL)
    if kind == "adapter":
        source, settings = first_source(TINY), {"adapter": random_adapter()}
    try:
        with open_grid(parallel) as grid:
            engine = Engine(source, parallel, dtype, grid, max_batch_size=4, **settings)
            before = card.launches["replay"] if card else 0
            found = engine.answer(requests())
            replays = card.launches["replay"] - before if card else 0
    finally:
        device.leave_out(())
    return [one.token_ids for one in found], [x for one in found for x in one.logprobs], replays


@pytest.mark.slow
def test_answers_are_the_cpus(ranks: RankPool, npu_ranks: RankPool) -> None:
    [(tokens, logprobs, _)] = ranks.run(1, answers, {}, "fp32")
    assert len({tuple(one) for one in tokens}) == len(tokens)
    alone, launched = (
        npu_ranks.run(1, answers, {}, "fp32", left_out) for left_out in ((), ("decode-graph",))
    )
    stages = npu_ranks.run(2, answers, {"pp": 2}, "fp32")
    for found in (*alone, *launched, *stages):
        assert found[0] == tokens
        assert found[1] == pytest.approx(logprobs, abs=1e-5)
    assert launched[0][2] == 0
    assert all(replays > 10 for *_, replays in (*alone, *stages))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4", "adapter"])
def test_answers_are_those_without_graphs(npu_ranks: RankPool, kind: str) -> None:
    """In bf16, with attention as an operator of the card."""
    [captured], [launched] = (
        npu_ranks.run(1, answers, {}, "bf16", left_out, kind)
        for left_out in ((), ("decode-graph",))
    )
    assert captured[0] == launched[0]
    assert captured[2] > 10
    assert launched[2] == 0


def after_nan() -> list[list[int]]:
    """Returns what follows on a prompt before and after another one is NaN in the same row."""
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    class Damaged:
        model = MODEL

        def read(self, weight: Any, layer: int | None = None) -> torch.Tensor:
            tensor = random_source(MODEL).read(weight, layer)
            if weight.logical == "embedding":
                tensor[99] = torch.nan
            return tensor

    with open_grid(ParallelConfig()) as grid:
        engine = Engine(Damaged(), ParallelConfig(), "bf16", grid, max_batch_size=1)  # type: ignore[arg-type]
        short = Request([5, 6], Sampling(logit_bias=((99, -100.0),)), 5)
        broken = Request([99] * 20, Sampling(), 5, raises=False)
        found = engine.answer([short, broken, short])
        assert found[1].problem is not None
        return [one.token_ids for one in found]


def test_a_text_that_is_nan_leaves_nothing_behind(npu_ranks: RankPool) -> None:
    """Attention reads the slots behind a text, too, and hides them by a mask."""
    [(before, _, after)] = npu_ranks.run(1, after_nan)
    assert len(before) == 5
    assert after == before


def attempts() -> tuple[dict[str, str], list[int]]:
    """Returns what is said of steps that can't be captured, and what one with a counter gives."""
    from glm3cli.device import require_active
    from glm3cli.errors import DeviceError

    device = require_active()
    numbers, others = torch.arange(4, device=device.torch_device()), torch.arange(4)
    refused: dict[str, Callable[[], torch.Tensor]] = {
        "item": lambda: numbers + int(numbers[1]),
        "tolist": lambda: numbers + sum(numbers.tolist()),
        "nonzero": lambda: numbers.nonzero(),
        "mask": lambda: numbers[numbers > 1],
        "branch": lambda: numbers if numbers.any() else numbers + 1,
        "to the host": lambda: numbers.cpu(),
        "from the host": lambda: numbers + torch.tensor([1], device=numbers.device),
        "into a tensor": lambda: numbers.copy_(others),
        "a wait": lambda: device.synchronize() or numbers,
    }
    said = {}
    for name, step in refused.items():
        with pytest.raises(DeviceError) as error:
            device.new_graphs().capture(step)
        said[name] = f"{error.value} {error.value.hint}"
    count = [0]

    def counted() -> torch.Tensor:
        count[0] += 1
        return numbers * 10 + count[0]

    replay = device.new_graphs().capture(counted)
    given = [replay()[1].item()]
    device.upload([[5, 6, 7, 8]], numbers.unsqueeze(0))
    return said, [*given, replay()[1].item()]


def test_a_graph_repeats_what_was_captured(npu_ranks: RankPool) -> None:
    """The emulation refuses what a card can't capture, and knows nothing of the host after."""
    [(said, given)] = npu_ranks.run(1, attempts)
    assert all("--without-kernel decode-graph" in one for one in said.values())
    assert all("within a graph" in one or "by a mask" in one for one in said.values()), said
    assert given == [12, 62]  # the step ran twice before: to warm up, and when it was captured


def warnings(options: dict[str, int], named: bool) -> list[str]:
    """Returns what an engine says when it is built."""
    from glm3cli.infer.engine import Engine
    from glm3cli.parallel.groups import open_grid

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("glm3cli.infer").addHandler(handler)
    parallel = ParallelConfig(**options)
    choices = {"shy": random_adapter()} if named else None
    with open_grid(parallel) as grid:
        engine = Engine(first_source(TINY), parallel, "fp32", grid, choices=choices)
        assert engine.batching.lanes[0].steps is None or not said
    return said


@pytest.mark.slow
def test_the_log_says_why_steps_are_not_captured(npu_ranks: RankPool) -> None:
    assert npu_ranks.run(1, warnings, {}, False) == [[]]
    [said], others = npu_ranks.run(2, warnings, {"tp": 2}, False)
    assert "--tp 2 sums between ranks" in said
    assert others == []
    [[said]] = npu_ranks.run(1, warnings, {}, True)
    assert "--lora NAME=ADAPTER" in said
