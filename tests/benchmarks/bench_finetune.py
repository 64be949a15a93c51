"""How fast tuning is in tokens without padding: padded, grouped, and packed; beside transformers.

    python -m tests.benchmarks.bench_finetune --rounds 3

tunes a ChatGLM3 of 8 layers, hidden size 512 and the whole vocabulary on real instructions, in fp32
with two threads, at --seq-length 512. Ways take turns. A rate is the number of tokens without
padding over the seconds of the steps, of all rounds but the first step of each. A step takes 8
samples (--samples), 4 at a time; packed ones are half as many packs, one at a time. The peer takes
the same samples one at a time without padding, as the way "one at a time" does. peft's adapter has
the rank of ours, and is on all linear layers of transformers' model.
"""

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.shared import SHARED

LENGTH, SEED = 512, 1234
WARM_UP = 1
SHAPE = {
    "num_layers": 8,
    "hidden_size": 512,
    "ffn_hidden_size": 1712,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 64,
    "padded_vocab_size": 65024,
    "seq_length": LENGTH,
    "torch_dtype": "fp32",
}
RANK = 8  # of adapters
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
TOGETHER = 4  # samples of a micro-batch
# The options of each way beside the batch, and the steps that it trains for one step of `--steps`.
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "full padding": ({"padding": "full"}, 1),
    "padding to the longest": ({}, 2),
    "grouped by length": ({"group-by-length": True}, 2),
    "packed": ({"packing": True}, 1),
    "one at a time": ({"micro-batch-size": 1, "pad-to-multiple": 1}, 2),
    "LoRA, one at a time": ({"micro-batch-size": 1, "pad-to-multiple": 1, "lora-rank": RANK}, 2),
    "LoRA, packed": ({"packing": True, "lora-rank": RANK}, 1),
}


def write_inputs(folder: Path, data: Path, tokenizer: Path) -> None:
    """Writes a random model, also as transformers reads it, and instructions as token files."""
    from glm3cli.checkpoint.convert.convert import convert
    from glm3cli.checkpoint.convert.random_model import write_random_model
    from glm3cli.checkpoint.random import RandomSource
    from glm3cli.config.convert import ConvertOptions
    from glm3cli.config.model import ModelConfig
    from glm3cli.config.preprocess import PreprocessConfig
    from glm3cli.data.preprocess.run import preprocess

    source = RandomSource(ModelConfig(**SHAPE), seed=1, std=0.02)
    write_random_model(folder / "model", source, tokenizer)
    convert(folder / "model", folder / "glm", ConvertOptions(layout="glm", verify=False))
    options = {
        "input": [data],
        "tokenizer": tokenizer,
        "output_prefix": folder / "data",
        "handler": "chat",
        "seq_length": LENGTH,
    }
    preprocess(PreprocessConfig.parse(options))


def train_ours(
    folder: Path, options: dict[str, Any], samples: int, steps: int
) -> tuple[float, float]:
    """Runs `glm3 finetune`; returns the unpadded tokens and the seconds of its steps."""
    run = Path(tempfile.mkdtemp(dir=folder))
    batch = {"global-batch-size": samples, "micro-batch-size": TOGETHER}
    if "packing" in options:
        batch = {"global-batch-size": samples // 2, "micro-batch-size": 1}
    values = {
        "model": folder / "model",
        "data": folder / "data",
        "save": run,
        "split": "1,0,0",
        "seq-length": LENGTH,
        "dtype": "fp32",
        "lr": 1e-5,
        "seed": SEED,
        "train-iters": steps,
        "device": "cpu",
        **batch,
        **options,
    }
    words = [
        str(word)
        for name, value in values.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", value])
    ]
    subprocess.run(
        [sys.executable, "-m", "glm3cli", "finetune", *words],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "loss" in line][WARM_UP:]
    subprocess.run(["rm", "-rf", run], check=True)
    tokens = sum(line["unpadded_tokens_per_second"] * line["step_time"] for line in timed)
    return tokens, sum(line["step_time"] for line in timed)


def train_transformers(folder: str, steps: int) -> None:
    """Prints the tokens and the seconds of its steps, for a process of its own.

    It takes the samples of the way "one at a time", in the same order.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/glm", dtype=torch.float32)
    train_peer(model.train(), folder, steps)


def train_peft(folder: str, steps: int) -> None:
    """Does the same with peft's adapter in place of the weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/glm", dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules=LINEAR))
    train_peer(adapted.train(), folder, steps)


def train_peer(model: Any, folder: str, steps: int) -> None:
    """Trains what of a model of transformers' kind has gradients."""
    import torch

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    batches = pickle.loads(Path(folder, "samples.pickle").read_bytes())[:steps]
    total_tokens, total_seconds = 0, 0.0
    for step, batch in enumerate(batches):
        started = time.perf_counter()
        trained = sum(int((labels != -100).sum()) for _, labels in batch)
        for tokens, labels in batch:
            logits = model(input_ids=torch.from_numpy(tokens)[None]).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(labels), reduction="sum"
            )
            (loss / trained).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= WARM_UP:
            total_seconds += time.perf_counter() - started
            total_tokens += sum(len(tokens) for tokens, _ in batch)
    print(json.dumps([total_tokens, total_seconds]))


def write_samples(folder: str, count: int, steps: int) -> None:
    """Writes token ids and labels of the `count` samples of each step, as training reads them.

    In a process of its own, so that nothing of glm3 is in the peer's.
    """
    import numpy as np

    from glm3cli.device import select

    select("cpu").activate()  # before megatron-core is imported
    from glm3cli.data.prefixes import Blend
    from glm3cli.data.samples.instructions import build_instruction
    from glm3cli.data.samples.spec import DataSpec
    from glm3cli.data.tokens.tokenizer import Tokenizer

    spec = DataSpec(Blend((f"{folder}/data",), None), "1,0,0", LENGTH, SEED, steps * count, 0)
    dataset, _ = build_instruction(spec, Tokenizer.load(Path(folder) / "model"))
    found = []
    for step in range(steps):
        read = [dataset[step * count + index] for index in range(count)]
        found.append([(s["tokens"], np.where(s["loss_mask"] > 0, s["labels"], -100)) for s in read])
    Path(folder, "samples.pickle").write_bytes(pickle.dumps(found))
    print(json.dumps(len(found)))


def in_process(function: Callable[..., None], *arguments: Any) -> Any:
    words = ", ".join(map(repr, arguments))
    name = function.__name__
    code = f"from tests.benchmarks.bench_finetune import {name}; {name}({words})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# Each peer prints the tokens and the seconds of its steps, and takes the samples that
# `write_samples` has written, one at a time. The ways of `WAYS` that it is to be compared with have
# their options there.
PEERS: dict[str, Callable[[str, int], None]] = {
    "transformers": train_transformers,
    "peft": train_peft,
}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "alpaca_en_1k.parquet")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "chatglm3-6b")
    given = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in (*WAYS, *PEERS)}
    peer_steps = WARM_UP + 2 * given.steps
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        write_inputs(folder, given.data, given.tokenizer)
        in_process(write_samples, str(folder), given.samples, peer_steps)
        for _ in range(given.rounds):
            for way, (options, times) in WAYS.items():
                steps = WARM_UP + times * given.steps
                tokens, seconds = train_ours(folder, options, given.samples, steps)
                rates[way].append(tokens / seconds)
            for name, train in PEERS.items():
                tokens, seconds = in_process(train, str(folder), peer_steps)
                rates[name].append(tokens / seconds)
    found = {way: statistics.median(each) for way, each in rates.items()}
    columns = ("full padding", "padding to the longest", *PEERS)
    print(f"| way | tokens/s without padding | {' | '.join(f'to {name}' for name in columns)} |")
    print("| --- |" + " --- |" * (len(columns) + 1))
    for way, rate in found.items():
        ratios = " | ".join(f"{rate / found[name]:.2f}" for name in columns)
        print(f"| {way} | {rate:.0f} | {ratios} |")


if __name__ == "__main__":
    main()
