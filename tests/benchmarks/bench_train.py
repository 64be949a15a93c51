"""How fast training is, beside transformers and the machine's own matrix product, in one run.

    python -m tests.benchmarks.bench_train --rounds 3

trains a ChatGLM3 of 8 layers, hidden size 512 and 8,192 entries on sequences of 512, two at a time,
in fp32: by `glm3 pretrain` in one process with two threads, and in two of one thread (tp 2, dp 2);
and by transformers' GlmForCausalLM with fused AdamW and the same clipping. Ways take turns; the
rates are medians over the steps of all rounds but the first steps of each. The matrix product is
2048 x 2048 x 2048, measured between them. Operations of a token: 6 x weights of the matrix products
+ 12 x layers x query size x sequence length.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH, BATCH, VOCABULARY = 512, 2, 8192
WARM_UP = 3
SHAPE = {
    "num_layers": 8,
    "hidden_size": 512,
    "ffn_hidden_size": 1712,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 64,
    "padded_vocab_size": VOCABULARY,
    "seq_length": LENGTH,
    "torch_dtype": "fp32",
}
WAYS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, tp 2": {"nproc": 2, "tp": 2},
    "ours, dp 2": {"nproc": 2, "micro-batch-size": 1},
}


def write_inputs(folder: Path) -> None:
    """A tokenizer, a shape, and a file of random tokens."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from glm3cli.config.model import ModelConfig
    from glm3cli.demo import content

    content.train_tokenizer(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps(ModelConfig(**SHAPE).to_hf()))
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.int32)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (400, LENGTH))
    for row in tokens:
        builder.add_document(row.tolist(), [len(row)])
    builder.finalize(str(folder / "data.idx"))


def train_ours(
    folder: Path, options: dict[str, Any], *, flag: str = "--async-save", **more: Any
) -> list[dict[str, Any]]:
    """Runs `glm3 pretrain`; gives the lines of its metrics.jsonl."""
    run = Path(tempfile.mkdtemp(dir=folder))
    values = {
        "model-config": folder / "config.json",
        "tokenizer": folder / "tokenizer",
        "data": folder / "data",
        "save": run,
        "seq-length": LENGTH,
        "micro-batch-size": BATCH,
        "global-batch-size": BATCH,
        "dtype": "fp32",
        "lr": 1e-4,
        "device": "cpu",
        **options,
        **more,
    }
    words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    threads = {"OMP_NUM_THREADS": str(2 // options.get("nproc", 1))}
    command = [sys.executable, "-m", "glm3cli", "pretrain", "--from-scratch", flag, *words]
    subprocess.run(command, check=True, env=os.environ | threads, stderr=subprocess.DEVNULL)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_transformers(steps: int) -> None:
    """Prints the seconds of each step, for a process of its own."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    torch.set_num_threads(2)
    config = GlmConfig(
        vocab_size=VOCABULARY,
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=SHAPE["ffn_hidden_size"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_attention_heads"],
        num_key_value_heads=SHAPE["num_query_groups"],
        head_dim=SHAPE["kv_channels"],
        attention_bias=True,
        partial_rotary_factor=0.5,
        tie_word_embeddings=False,
        pad_token_id=None,
        eos_token_id=None,
    )
    model = GlmForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times = []
    for _ in range(steps):
        tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
        started = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
    print(json.dumps(times))


def multiply() -> None:
    """Prints the operations per second of a matrix product, for a process of its own."""
    import torch

    torch.set_num_threads(2)
    left, right, result = (torch.randn(2048, 2048) for _ in range(3))
    times = []
    for _ in range(20):
        started = time.perf_counter()
        torch.mm(left, right, out=result)
        times.append(time.perf_counter() - started)
    print(json.dumps(2 * 2048**3 / statistics.median(times[3:])))


def in_process(function: str, *arguments: int) -> Any:
    words = ", ".join(map(str, arguments))
    code = f"from tests.benchmarks.bench_train import {function}; {function}({words})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def saves(folder: Path, steps: int) -> dict[str, list[dict[str, Any]]]:
    """The save events of runs that save while training goes on, and at once."""
    return {
        name: [
            record
            for record in train_ours(
                folder, {}, flag=f"--{name}", **{"train-iters": steps, "save-interval": 4}
            )
            if record.get("event") == "save"
        ]
        for name in ("async-save", "no-async-save")
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=13)
    given = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in ("transformers", *WAYS)}
    overhead, products = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for _ in range(given.rounds):
            products.append(in_process("multiply"))
            times["transformers"] += in_process("train_transformers", given.steps)[WARM_UP:]
            for way, options in WAYS.items():
                records = train_ours(folder, options, **{"train-iters": given.steps})
                steps = [one for one in records if "loss" in one][WARM_UP:]
                times[way] += [one["step_time"] for one in steps]
                if way == "ours":
                    overhead += [
                        (one["other_time"] + one["data_wait_time"]) / one["step_time"]
                        for one in steps
                    ]
            products.append(in_process("multiply"))
        saved = saves(folder, 12)
    report(times, statistics.median(products), statistics.median(overhead), saved)


def report(
    times: dict[str, list[float]],
    product: float,
    overhead: float,
    saved: dict[str, list[dict[str, Any]]],
) -> None:
    from glm3cli.config.model import ModelConfig
    from glm3cli.train.progress.flops import flops_per_token

    operations = flops_per_token(ModelConfig(**SHAPE), LENGTH)
    theirs = statistics.median(times["transformers"])
    print(f"matrix product: {product / 1e9:.1f} GFLOP/s")
    print("| way | step, s | tokens/s | to transformers | to the matrix product |")
    for way, seconds in times.items():
        step = statistics.median(seconds)
        rate = LENGTH * BATCH / step
        print(
            f"| {way} | {step:.3f} | {rate:.0f} | {theirs / step:.2f} | "
            f"{rate * operations / product:.1%} |"
        )
    print(f"loop overhead: {overhead:.2%}")
    at_once = statistics.median(one["durable_seconds"] for one in saved["no-async-save"])
    for name, events in saved.items():
        stall, durable = (
            statistics.median(one[key] for one in events)
            for key in ("stall_seconds", "durable_seconds")
        )
        print(f"--{name}: stall {stall:.2f} s ({stall / at_once:.0%}), durable {durable:.2f} s")


if __name__ == "__main__":
    main()
