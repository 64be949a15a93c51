"""How often a tuned model ends its answers by itself: all weights and LoRA, packed and not.

    python -m tests.benchmarks.stop_answers --prompts 200

makes the demo's tokenizer and small model, pretrains it on the demo's documents, tunes it on
conversations (opposites of one to three words, in one or two turns), and asks prompts that training
doesn't have, each as a conversation of one turn. An answer that doesn't end by itself goes on for
64 tokens. Every way of tuning is one run of `glm3 finetune` on raw data with `--handler chat`'s
template. The program ends with 1 if a way is below 98 %.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.project import environment

LONGEST = 64
ENOUGH = 0.98
TRAINED: dict[str, dict[str, Any]] = {
    "weights": {"lr": 5e-3, "min-lr": 5e-4, "train-iters": 240},
    # The embedding of the chat's roles stays as random as it was: the rest takes longer to learn.
    "LoRA": {
        "lr": 3e-3,
        "min-lr": 3e-4,
        "train-iters": 700,
        "lora-rank": 32,
        "weight-decay": 0.0,
    },
}
BATCHES: dict[str, dict[str, Any]] = {"padded": {}, "packed": {"packing": True}}
SIZES = {"tp1 pp1": {}, "tp2 pp2": {"nproc": 4, "tp": 2, "pp": 2}}
RECIPE = {
    "dtype": "fp32",
    "split": "1,0,0",
    "seq-length": 128,
    "lr-warmup-iters": 10,
    "device": "cpu",
}


def conversations(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Draws distinct conversations about opposites; all are different for one seed."""
    from glm3cli.demo.words import OPPOSITES

    opposites = {one: other for pair in OPPOSITES for one, other in (pair, pair[::-1])}
    drawn, found, seen = random.Random(seed), [], set()
    while len(found) < count:
        turns: list[dict[str, str]] = []
        for _ in range(drawn.choice((1, 1, 1, 2))):
            words = drawn.sample(sorted(opposites), drawn.choice((1, 2, 2, 3, 3)))
            answer = " and ".join(opposites[word] for word in words)
            turns += [
                {"role": "user", "content": f"Give the opposites of {' and '.join(words)}."},
                {"role": "assistant", "content": answer},
            ]
        key = turns[-2]["content"]
        if key not in seen:
            seen.add(key)
            found.append(turns)
    return found


def glm3(*words: object) -> str:
    """Runs the program and returns its stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "glm3cli", *map(str, words)],
        env=environment() | {"OMP_NUM_THREADS": "1"},  # so small a model is slower on more
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout


def options(values: dict[str, Any]) -> list[Any]:
    return [
        word
        for name, value in values.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", value])
    ]


def pretrained(folder: Path) -> Path:
    """Pretrains the demo's model on the demo's documents."""
    from glm3cli.checkpoint.convert.random_model import write_random_model
    from glm3cli.checkpoint.random import RandomSource
    from glm3cli.demo import content

    content.train_tokenizer(folder / "tokenizer")
    source = RandomSource(content.MODEL, seed=1, std=content.INIT_METHOD_STD)
    write_random_model(folder / "random", source, folder / "tokenizer")
    write_lines(folder / "text.jsonl", [{"text": text} for text in content.pretrain_documents()])
    recipe = {name.replace("_", "-"): value for name, value in vars(content.PRETRAIN).items()}
    values = {**RECIPE, **recipe, "model": folder / "random", "data": folder / "text.jsonl"}
    glm3("pretrain", *options({**values, "save": folder / "base"}))
    return folder / "base"


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def stopped(folder: Path, run: Path, held_out: list[list[dict[str, str]]]) -> tuple[int, int]:
    """Asks the held-out prompts; returns how many answers end by themselves, and are right."""
    prompts = folder / "prompts.jsonl"
    write_lines(prompts, [{"prompt": turns[-2]["content"]} for turns in held_out])
    asked = {"prompts-file": prompts, "max-new-tokens": LONGEST, "device": "cpu", "dtype": "fp32"}
    found = glm3("generate", "--model", run, "--answer", "--greedy", "--json", *options(asked))
    results = json.loads(found)["results"]
    assert len(results) == len(held_out)
    ended = sum(result["finish_reason"] == "stop" for result in results)
    right = sum(
        result["text"].strip() == turns[-1]["content"]
        for result, turns in zip(results, held_out, strict=True)
    )
    return ended, right


def main() -> None:
    """Prints a table, and ends with 1 if a way is not good enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--trained", nargs="+", default=list(TRAINED), choices=TRAINED)
    given = parser.parse_args()
    is_enough = True
    print("| trained | batches | parallel sizes | last loss | end by themselves | right |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = pretrained(folder)
        drawn = conversations(2000 + given.prompts, seed=3)
        known, held_out = drawn[given.prompts :], drawn[: given.prompts]
        write_lines(folder / "chat.jsonl", [{"messages": turns} for turns in known])
        for trained in given.trained:
            for batches, packs in BATCHES.items():
                for sizes, layout in SIZES.items():
                    run = folder / f"{trained}-{batches}-{sizes}".replace(" ", "-")
                    # A pack holds about four conversations.
                    batch = 8 if packs else 32
                    values = {
                        **RECIPE,
                        **TRAINED[trained],
                        **packs,
                        **layout,
                        "model": base,
                        "data": folder / "chat.jsonl",
                        "data-cache": folder / "cache",
                        "save": run,
                        "micro-batch-size": batch // 2,
                        "global-batch-size": batch,
                    }
                    glm3("finetune", *options(values))
                    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
                    losses = [
                        record["loss"] for record in map(json.loads, lines) if "loss" in record
                    ]
                    ended, right = stopped(folder, run, held_out)
                    is_enough &= ended >= ENOUGH * given.prompts
                    print(
                        f"| {trained} | {batches} | {sizes} | {losses[-1]:.4f} | "
                        f"{ended} of {given.prompts} | {right} |",
                        flush=True,
                    )
    sys.exit(0 if is_enough else 1)


if __name__ == "__main__":
    main()
