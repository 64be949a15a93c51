"""Predicted against measured step times, on this machine's CPU, in one run.

    python -m tests.benchmarks.predict_cpu --rounds 3

describes the machine by what it measures of single operators (matrix products of the model's
shapes, attention, passes over activations), of a model too small for anything but overhead, and of
gloo between two ranks; predicts the step of several layouts by the code that plans for Ascend; and
trains them. One thread per rank; ranks share the cores, so two ranks are measured at work together.
A round measures everything once, one after the other; its ratios are what is compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from tests.support.ranks import RankPool

SHAPE = {
    "num_layers": 4,
    "hidden_size": 512,
    "ffn_hidden_size": 1408,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 64,
    "padded_vocab_size": 4096,
    "seq_length": 256,
    "torch_dtype": "fp32",
}
# So small that only the calls take time.
SPECK = {**SHAPE, "hidden_size": 16, "ffn_hidden_size": 16, "kv_channels": 4, "seq_length": 8}
OPTIONS = {"seq_length": 256, "micro_batch_size": 2, "global_batch_size": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "1 rank, micro-batch 4": {"micro_batch_size": 4},
    "1 rank, recompute full": {"recompute": "full"},
    "tp 2": {"tp": 2},
    "pp 2": {"pp": 2, "micro_batch_size": 1},
    "pp 2, vpp 2": {"pp": 2, "vpp": 2, "micro_batch_size": 1},
    "dp 2": {},
    "cp 2": {"cp": 2},
}
RANKS = {name: 1 if name.startswith("1 rank") else 2 for name in LAYOUTS}
STEPS = 3


def step_seconds(shape: dict[str, Any], options: dict[str, Any]) -> float:
    """Mean over steps of real training, on a rank."""
    from glm3cli.config.model import ModelConfig
    from glm3cli.data.loader import Loader
    from glm3cli.device import require_active
    from glm3cli.parallel.groups import open_grid
    from glm3cli.train.setup import build_trainer
    from tests.support.tiny import Samples, train_config

    require_active().keep_freed_memory()
    config, model = train_config(**options), ModelConfig(**shape)
    with open_grid(config) as grid:
        trainer = build_trainer(config, model, grid)
        fill(trainer)
        loader = Loader(
            dataset=Samples(config.seq_length, model.padded_vocab_size),
            micro_batch_size=config.micro_batch_size,
            global_batch_size=config.global_batch_size,
            dp_rank=grid.dp_rank,
            dp_size=grid.dp_size,
            cp_rank=grid.cp_rank,
            cp_size=grid.cp_size,
            vocab_size=model.padded_vocab_size,
            device=require_active().torch_device(),
        )
        trainer.step(loader, 0)
        return mean_seconds(lambda: trainer.step(loader, 0), STEPS)


def fill(trainer: Any) -> None:
    """Weights of the size that a model begins with; numbers as they come may be denormal."""
    import torch

    for chunk in trainer.chunks:
        for parameter in chunk.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    trainer.optimizer.reload_model_params()


def mean_seconds(run: Callable[[], object], times: int) -> float:
    """Of one call, over many: what others take from the cores is spread over all alike."""
    run()
    started = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - started) / times


def rates(tokens: int) -> dict[str, float]:
    """Operations and bytes per second of single operators, on a rank."""
    import torch
    import torch.distributed as dist

    from glm3cli.config.model import ModelConfig
    from glm3cli.device.kernels import Kernels
    from glm3cli.parallel.join import join

    if not dist.is_initialized():
        from datetime import timedelta

        join("gloo", timedelta(minutes=5))
    model = ModelConfig(**SHAPE)
    h, ffn, qkv = model.hidden_size, model.ffn_hidden_size, model.query_size + 2 * model.kv_size
    products = seconds = 0.0
    for rows, columns in ((h, qkv), (h, h), (h, 2 * ffn), (ffn, h), (h, model.padded_vocab_size)):
        inputs, weight = torch.randn(tokens, rows), torch.randn(columns, rows)
        grads = torch.randn(tokens, columns)
        products += 3 * 2.0 * tokens * rows * columns
        seconds += mean_seconds(lambda: inputs @ weight.t(), 5)  # noqa: B023
        seconds += mean_seconds(lambda: grads @ weight, 5)  # noqa: B023
        seconds += mean_seconds(lambda: weight.addmm_(grads.t(), inputs), 5)  # noqa: B023

    length, heads = model.seq_length, model.num_attention_heads
    batch = tokens // length
    query = torch.randn(length, batch, heads, 64, requires_grad=True)
    key, value = (torch.randn(length, batch, 2, 64, requires_grad=True) for _ in range(2))

    def attend() -> None:
        Kernels().attention(query, key, value, 0.1, None).sum().backward()

    pairs = 7 * 2.0 * batch * heads * length * length / 2 * 64
    wide, other = torch.randn(tokens, 2 * ffn), torch.randn(tokens, 2 * ffn)
    # Ten tensors read or written, in passes as a layer's.
    runs = [
        lambda: torch.add(wide, other),
        lambda: torch.nn.functional.silu(wide),
        lambda: wide.add_(other),
        lambda: wide.mul(0.5),
    ]
    found = {
        "matrix": products / seconds,
        "attention": pairs / mean_seconds(attend, 5),
        "memory": 10 * wide.numel() * 4 / sum(mean_seconds(run, 5) for run in runs),
    }
    if dist.get_world_size() > 1:
        small, large = torch.zeros(8), torch.zeros(2**20)
        results = [[torch.empty_like(one) for _ in range(2)] for one in (small, large)]
        latency = mean_seconds(lambda: dist.all_gather(results[0], small), 50)
        gather = mean_seconds(lambda: dist.all_gather(results[1], large), 10)
        found |= {"latency": latency, "link": 4 * 2**20 / max(gather - latency, 1e-9)}
    dist.destroy_process_group()
    return found


def describe(pool: RankPool, ranks: int) -> Any:
    """This machine as a chip, with that many ranks at work."""
    from glm3cli.config.model import ModelConfig
    from glm3cli.device.catalog import Chip
    from glm3cli.train.stage import record_stage

    tokens = OPTIONS["seq_length"] * OPTIONS["micro_batch_size"]
    found = pool.run(ranks, rates, tokens)
    mean = {key: statistics.mean(one[key] for one in found) for key in found[0]}
    options = {**OPTIONS, "seq_length": 8, "global_batch_size": 4 * ranks}
    seconds = max(pool.run(ranks, step_seconds, SPECK, options))
    work = record_stage(plan(options, ranks), ModelConfig(**SPECK), "cpu", 0)
    chunk = work.chunks[0]
    calls = [*2 * [*chunk.forward, *chunk.backward], *work.update]
    messages = sum(one.kind == "message" for one in calls)
    latency = mean.get("latency", 0.0)
    overhead = (seconds - messages * latency) / (len(calls) - messages)
    return Chip(
        "this CPU",
        kind="cpu",
        peak_tflops=mean["matrix"] / 1e12,
        attention_efficiency=mean["attention"] / mean["matrix"],
        memory_gib=1,
        memory_bandwidth=mean["memory"],
        launch=overhead,
        link_bandwidth=mean.get("link", 1.0),
        latency=latency,
        num_links=1,
        network_bandwidth=1.0,
    )


def plan(options: dict[str, Any], ranks: int) -> Any:
    from tests.support.tiny import train_config

    return train_config(**options, dry_run=True, planned_world_size=ranks)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    from glm3cli.device import select

    select("cpu").activate()
    from glm3cli.config.model import ModelConfig
    from glm3cli.train.forecast import forecast

    pool, model = RankPool(2), ModelConfig(**SHAPE)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LAYOUTS}
    for number in range(given.rounds):
        for ranks in (1, 2):
            chip = describe(pool, ranks)
            print(f"round {number + 1}, {ranks} rank(s): {chip}")
            for name in (name for name in LAYOUTS if RANKS[name] == ranks):
                options = {**OPTIONS, **LAYOUTS[name]}
                measured = max(pool.run(ranks, step_seconds, SHAPE, options))
                predicted = forecast(plan(options, ranks), model, chip).seconds
                found[name].append((predicted, measured))
    pool.close()
    print("| layout | predicted, s | measured, s | predicted / measured: median | all rounds |")
    for name, pairs in found.items():
        ratios = [predicted / measured for predicted, measured in pairs]
        predicted, measured = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"| {name} | {predicted:.3f} | {measured:.3f} | {statistics.median(ratios):.2f} | "
            + " ".join(f"{ratio:.2f}" for ratio in ratios)
            + " |"
        )


if __name__ == "__main__":
    main()
