"""For what the host waits while the emulated NPU works, and what it launches there.

A host that waits lets the card run dry. It may do so a few times in a step, whatever the number of
micro-batches, and once for a decoded token, whose id it reads.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_engine import LENGTH, MODEL, PROMPTS, random_source
from tests.distributed.test_packed_training import write_files
from tests.support.ranks import RankPool
from tests.support.slow import mostly_slow
from tests.support.training import build

pytestmark = pytest.mark.dist

CALLED = ("rms-norm", "swiglu", "rotary", "attention", "adamw")
CALLED_OPERATORS = {
    *("npu_rms_norm", "npu_swiglu", "npu_rotary_mul", "npu_fusion_attention", "_fused_adamw_")
}
RECOMPUTED = {"recompute": "full"}
STEPS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, RECOMPUTED),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dpo": (1, {"method": "dpo", "seq_length": 32}),
}


def waits_of_steps(
    options: dict[str, Any], prefix: str | None
) -> tuple[Counter[str], Counter[str]]:
    """Returns the waits of a step with two micro-batches, and of one with four."""
    from glm3cli.data.prefixes import Blend
    from glm3cli.data.samples.instructions import build_instruction
    from glm3cli.data.samples.spec import DataSpec
    from glm3cli.device import require_active
    from glm3cli.parallel.groups import open_grid
    from glm3cli.train.progress.operators import Recorder, describe
    from tests.support.tiny import train_config
    from tests.support.tiny_tokenizer import tiny_tokenizer

    card: Any = require_active().card  # type: ignore[attr-defined]
    found = []
    for count in (2, 4):
        sizes = {"micro_batch_size": 1, "global_batch_size": count}
        with open_grid(train_config(**sizes, **options)) as grid:
            config, train_step, loader = build({**sizes, **options}, grid)
            if prefix is not None:
                spec = DataSpec(Blend((prefix,), None), "1,0,0", config.seq_length, 1, count, 0)
                loader = replace(loader, dataset=build_instruction(spec, tiny_tokenizer())[0])
            with Recorder() as recorder:
                train_step.run(loader, 0)  # makes what all steps share
            told = describe(recorder.seen)
            assert {told["used"][name] for name in CALLED} == CALLED_OPERATORS
            assert ("cross-entropy" in told["unused"]) == (config.tp > 1)
            with card.counting() as (launches, waits):
                train_step.run(loader, 0)
            assert launches["_fused_adamw_"] > 0
            found.append(waits)
    return found[0], found[1]


@pytest.mark.parametrize("name", mostly_slow(STEPS, ["one rank", "dpo"]))
def test_no_micro_batch_makes_the_host_wait(npu_ranks: RankPool, tmp_path: Path, name: str) -> None:
    size, options = STEPS[name]
    prefix = None
    if "method" not in options:
        write_files(tmp_path / "packed", packed=True)
        prefix = str(tmp_path / "packed")
    for two, four in npu_ranks.run(size, waits_of_steps, options, prefix):
        assert two == four
        assert two["synchronize"] == 1  # when the step's time is taken
        assert two["nonzero"] == 0
        assert sum(two.values()) <= 8


def decoding(
    options: dict[str, Any], left_out: tuple[str, ...]
) -> list[tuple[Counter[str], Counter[str]]]:
    """Returns what each token of three rows launches and waits for, after two others.

    Of these, the first is the prompts', and the second captures what the others replay.
    """
    from glm3cli.config.parallel import ParallelConfig
    from glm3cli.device import require_active
    from glm3cli.infer.engine import Engine
    from glm3cli.infer.requests import Request
    from glm3cli.infer.sampling import Sampling
    from glm3cli.parallel.groups import open_grid

    device: Any = require_active()
    card, parallel = device.card, ParallelConfig(**options)
    device.leave_out(left_out)
    found = []
    with open_grid(parallel) as grid:
        engine = Engine(random_source(MODEL), parallel, "bf16", grid)
        device.leave_out(())
        for prompt in PROMPTS[:3]:
            engine.add(Request(prompt, Sampling(), LENGTH, [], 0))
        engine.step()
        while not engine.is_idle:
            with card.counting() as counted:
                engine.step()
            found.append(counted)
    return found[2:-1]


WAYS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "a graph": ({}, ()),
    "no graph": ({}, ("decode-graph",)),
    "tp2": ({"tp": 2}, ()),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_token_is_read_once(npu_ranks: RankPool, way: str) -> None:
    options, left_out = WAYS[way]
    for tokens in npu_ranks.run(options.get("tp", 1), decoding, options, left_out):
        assert len(tokens) > 3
        for launches, waits in tokens:
            assert (launches, waits) == tokens[0]
            assert sum(waits.values()) == 1
            layers = launches["npu_fused_infer_attention_score"]
            if way == "a graph":  # after the numbers are copied; then the token is chosen
                assert layers == 0
                assert launches["replay"] == 1
                assert sum(launches.values()) <= 10
            else:
                assert layers == MODEL.num_layers
                assert launches["cos"] == launches["sin"] == 1  # one rotation for all layers
                assert sum(launches.values()) <= 20 * layers + 20
