"""What weights of 8 and 4 bits cost a trained model: perplexity, and answers to questions.

    python -m tests.benchmarks.quantized_quality

trains a small model on the demo's documents but the last fiftieth, and evaluates it as it is and
with --quantize: the perplexity of the documents that were left out, the accuracy in the demo's
mini-MMLU by the program's own command, and how many of its choices are others than with whole
weights. A larger model loses less; one whose layers have fewer than 128 inputs has smaller groups.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.stop_answers import RECIPE, glm3, options, write_lines

SIZES = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256, "kv_channels": 32}
HELD_OUT = 50  # one document of so many


def trained(folder: Path, steps: int) -> tuple[Path, list[str]]:
    """Trains the model; returns its run, and the documents that it hasn't seen."""
    from glm3cli.checkpoint.convert.random_model import write_random_model
    from glm3cli.checkpoint.random import RandomSource
    from glm3cli.demo import content

    content.train_tokenizer(folder / "tokenizer")
    model = content.MODEL.model_copy(update=SIZES)
    write_random_model(
        folder / "random", RandomSource(model, seed=1, std=0.05), folder / "tokenizer"
    )
    documents = content.pretrain_documents()
    held_out = documents[::HELD_OUT]
    kept = [text for place, text in enumerate(documents) if place % HELD_OUT]
    write_lines(folder / "text.jsonl", [{"text": text} for text in kept])
    values: dict[str, Any] = {
        **RECIPE,
        "model": folder / "random",
        "data": folder / "text.jsonl",
        "save": folder / "run",
        "train-iters": steps,
        "micro-batch-size": 8,
        "global-batch-size": 8,
        "lr": 3e-3,
        "min-lr": 2e-4,
    }
    glm3("pretrain", *options(values))
    return folder / "run", held_out


def perplexity(run: Path, bits: str | None, documents: list[str]) -> float:
    """Returns the perplexity of the tokens of documents, each read by itself."""
    import glm3cli

    with glm3cli.open_model(run, dtype="fp32", device="cpu", quantize=bits) as model:  # type: ignore[arg-type]
        prefix = list(model.tokenizer.prefix)
        texts = [model.tokenizer.encode(text)[: 128 - len(prefix)] for text in documents]
        found = model.engine.continuation_logprobs([prefix] * len(texts), texts)
    return math.exp(-sum(score for score, _ in found) / sum(map(len, texts)))


def choices(run: Path, bits: str | None, file: Path) -> tuple[float, list[Any]]:
    """Returns the accuracy in the demo's mini-MMLU, and every choice."""
    from glm3cli.demo.quiz import MMLU_DIR

    asked = {"model": run, "data-dir": MMLU_DIR, "output": file, "shots": 0, "device": "cpu"}
    asked["dtype"] = "fp32"
    glm3("eval", "mmlu", *options(asked | ({"quantize": bits} if bits else {})))
    found = json.loads(file.read_text("utf-8"))
    return found["micro"], [question["choice"] for question in found["questions"]]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    print("| weights | perplexity | to whole weights | accuracy | other choices |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        run, held_out = trained(Path(name), given.steps)
        whole, theirs = 0.0, []
        for bits in (None, "int8", "int4"):
            found = perplexity(run, bits, held_out)
            accuracy, chosen = choices(run, bits, Path(name) / f"{bits}.json")
            if bits is None:
                whole, theirs = found, chosen
            others = sum(one != other for one, other in zip(chosen, theirs, strict=True))
            print(
                f"| {bits or 'fp32'} | {found:.3f} | {found / whole - 1:+.2%} | {accuracy:.3f} | "
                f"{others} of {len(chosen)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
