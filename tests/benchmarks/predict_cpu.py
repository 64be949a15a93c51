"""Compares predicted with measured step times on this machine's CPU.

    python -m tests.benchmarks.predict_cpu --rounds 3
    glm3 doctor --numerics --device cpu --nproc 2 --chip-file mine.toml &&
        python -m tests.benchmarks.predict_cpu --chip mine.toml

The program measures single operators (matrix products of the model's shapes, attention, passes over
activations) and a model too small for anything but overhead, all in seconds of the process, and
describes a core as a device by them; with --chip it takes the description in a file. It predicts
the step of several parallel plans by the code that plans for Ascend, and trains these plans with
one thread per rank.

The machine may have other work. Therefore every rank runs the matrix products, and the gather
between two ranks, once more before and after each step. How much slower they are on the clock than
undisturbed shows how much of a core the step had. The step around which they were the fastest is
the one that is compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
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
TOKENS = OPTIONS["seq_length"] * OPTIONS["micro_batch_size"]
STEPS = 8
LARGE = 2**22  # numbers of the larger one of the gathered tensors


def seconds(run: Callable[[], object], times: int, clock: Callable[[], float]) -> float:
    """Returns the mean seconds of one call."""
    started = clock()
    for _ in range(times):
        run()
    return (clock() - started) / times


def products() -> tuple[float, Callable[[], None]]:
    """Returns the operations of the linear layers' products, and a function that computes them."""
    import torch

    from glm3cli.config.model import ModelConfig

    model = ModelConfig(**SHAPE)
    h, ffn, qkv = model.hidden_size, model.ffn_hidden_size, model.query_size + 2 * model.kv_size
    shapes = [(h, qkv), (h, h), (h, 2 * ffn), (ffn, h), (h, model.padded_vocab_size)]
    tensors = [
        (torch.randn(TOKENS, rows), torch.randn(columns, rows), torch.randn(TOKENS, columns))
        for rows, columns in shapes
    ]

    def run() -> None:
        for inputs, weight, grads in tensors:
            torch.mm(inputs, weight.t())
            torch.mm(grads, weight)
            weight.addmm_(grads.t(), inputs, alpha=1e-9)

    return sum(3 * 2.0 * TOKENS * rows * columns for rows, columns in shapes), run


def core() -> dict[str, float]:
    """Returns the operations and bytes per second of a core, measured on a rank."""
    import torch

    from glm3cli.device.kernels import Kernels

    operations, multiply = products()
    length, batch = OPTIONS["seq_length"], OPTIONS["micro_batch_size"]
    query = torch.randn(length, batch, 8, 64, requires_grad=True)
    key, value = (torch.randn(length, batch, 2, 64, requires_grad=True) for _ in range(2))
    grad = torch.randn(length, batch, 8, 64)

    def attend() -> None:
        Kernels().attention(query, key, value, 0.1, None).backward(grad)

    wide, other = (torch.randn(TOKENS, 2 * SHAPE["ffn_hidden_size"]) for _ in range(2))  # type: ignore[operator]

    def pass_over() -> None:
        """Reads or writes ten tensors, in passes like a layer's."""
        torch.add(wide, other)
        torch.nn.functional.silu(wide)
        wide.add_(other, alpha=1e-9)
        wide.mul(0.5)

    for run in (multiply, attend, pass_over):
        run()
    clock = time.process_time
    pairs = batch * 8 * length * length / 2
    return {
        "matrix": operations / seconds(multiply, 10, clock),
        "attention": 7 * 2.0 * pairs * 64 / seconds(attend, 20, clock),
        "memory": 10 * wide.numel() * 4 / seconds(pass_over, 20, clock),
    }


def steps(
    shape: dict[str, Any], options: dict[str, Any], clock_name: str = "perf_counter"
) -> list[dict[str, float]]:
    """Returns the seconds of real steps, and of the products and gathers around each."""
    import torch
    import torch.distributed as dist

    from glm3cli.config.model import ModelConfig
    from glm3cli.device import require_active
    from glm3cli.parallel.groups import open_grid
    from glm3cli.train.setup import build_train_step, make_loader
    from tests.support.tiny import Samples, train_config

    require_active().tune_memory_for_training()
    config, model, clock = train_config(**options), ModelConfig(**shape), getattr(time, clock_name)
    operations, multiply = products()
    with open_grid(config) as grid:
        train_step = build_train_step(config, model, grid)
        fill(train_step)
        loader = make_loader(
            config, model, grid, Samples(config.seq_length, model.padded_vocab_size)
        )
        small, large = torch.zeros(8), torch.zeros(LARGE)
        results = [torch.empty(grid.world_size * one.numel()) for one in (small, large)]
        train_step.run(loader, 0)
        multiply()
        windows = []
        for _ in range(STEPS):
            window = dict.fromkeys(("multiply", "small", "large"), 0.0)
            dist.barrier()
            window["multiply"] += seconds(multiply, 2, clock) / 2
            dist.barrier()
            window["step"] = seconds(lambda: train_step.run(loader, 0), 1, clock)
            dist.barrier()
            window["multiply"] += seconds(multiply, 2, clock) / 2
            window["small"] = seconds(
                lambda: dist.all_gather_into_tensor(results[0], small), 20, clock
            )
            window["large"] = seconds(
                lambda: dist.all_gather_into_tensor(results[1], large), 1, clock
            )
            windows.append(window | {"operations": operations})
    return windows


def calmest(runs: list[list[dict[str, float]]]) -> dict[str, float]:
    """Returns the step around which the slowest rank's matrix products were the fastest."""
    windows = [
        {key: max(rank[key] for rank in ranks) for key in ranks[0]}
        for ranks in zip(*runs, strict=True)
    ]
    return min(windows, key=lambda window: window["multiply"])


def fill(train_step: Any) -> None:
    """Fills weights with numbers of the usual size; uninitialised ones may be slow denormals."""
    import torch

    for chunk in train_step.chunks:
        for parameter in chunk.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    train_step.optimizer.reload_model_params()


def describe(pool: RankPool) -> Any:
    """Describes an undisturbed core as a device without links."""
    from glm3cli.config.model import ModelConfig
    from glm3cli.device.catalog import Chip
    from glm3cli.forecast.record import record_stage

    [found] = pool.run(1, core)
    options = {**OPTIONS, "seq_length": 8}
    [windows] = pool.run(1, steps, SPECK, options, "process_time")
    overhead = statistics.median(window["step"] for window in windows)
    work = record_stage(plan(options, 1), ModelConfig(**SPECK), "cpu", 0)
    chunk = work.chunks[0]
    calls = 2 * len([*chunk.forward, *chunk.backward]) + len(work.update)
    return Chip(
        "a core",
        kind="cpu",
        peak_tflops=found["matrix"] / 1e12,
        attention_efficiency=found["attention"] / found["matrix"],
        memory_gib=1,
        memory_bandwidth=found["memory"],
        launch=overhead / calls,
        link_bandwidth=1.0,
        num_links=1,
        network_bandwidth=1.0,
    )


def slowed(chip: Any, found: dict[str, float]) -> Any:
    """Describes the core and gloo as they were on the clock between the steps."""
    share = found["operations"] / found["multiply"] / (chip.peak_tflops * 1e12)
    return replace(
        chip,
        peak_tflops=chip.peak_tflops * share,
        memory_bandwidth=chip.memory_bandwidth * share,
        launch=chip.launch / share,
        latency=found["small"],
        # A rank of two sends what the other one gets.
        link_bandwidth=LARGE * 4 / max(found["large"] - found["small"], 1e-9),
    )


def plan(options: dict[str, Any], ranks: int) -> Any:
    from tests.support.tiny import train_config

    return train_config(**options, dry_run=True, planned_world_size=ranks)


def main() -> None:
    """Prints the table of predicted and measured steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chip", help="a file of `glm3 doctor --numerics --chip-file`")
    given = parser.parse_args()
    from glm3cli.device import select

    select("cpu").activate()
    from glm3cli.config.model import ModelConfig
    from glm3cli.device.catalog import find_chip
    from glm3cli.forecast.forecast import forecast

    pool, model = RankPool(), ModelConfig(**SHAPE)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LAYOUTS}
    for number in range(given.rounds):
        chip = describe(pool) if given.chip is None else find_chip(given.chip)
        print(
            f"round {number + 1}, a core: {chip.peak_tflops * 1e3:.1f} GFLOP/s in matrix products, "
            f"{chip.attention_efficiency:.0%} of it in attention, "
            f"{chip.memory_bandwidth / 1e9:.1f} GB/s, {chip.launch * 1e6:.0f} us a call",
            flush=True,
        )
        for name, ranks in RANKS.items():
            options = {**OPTIONS, **LAYOUTS[name]}
            runs = pool.run(ranks, steps, SHAPE, options)
            window = calmest(runs)
            slower = slowed(chip, window)
            predicted = forecast(plan(options, ranks), model, slower).seconds
            found[name].append((predicted, window["step"]))
            print(
                f"{name}: predicted {predicted:.3f} s, measured {window['step']:.3f} s with "
                f"{slower.peak_tflops / chip.peak_tflops:.0%} of a core, latency "
                f"{slower.latency * 1e3:.2f} ms, link {slower.link_bandwidth / 1e9:.2f} GB/s",
                flush=True,
            )
    pool.close()
    print("| parallel sizes | predicted, s | measured, s | their ratio: median | all rounds |")
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
