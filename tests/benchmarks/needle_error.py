"""Shows that `glm3 eval needle` finds wrong positions that questions of a few words don't show.

    python -m tests.benchmarks.needle_error

trains a small model, for a quarter of an hour on a core, to tell numbers that stand anywhere in a
text, and which letter goes with a word. Its config.json is then changed, so that every position is
multiplied by a factor, as one that is misread does, and both are asked for again. The queries and
keys of this model have no part that isn't turned: so small a model would find all by that part.
"""

import argparse
import io
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glm3cli.config.model import ModelConfig
from glm3cli.evals import needle
from tests.benchmarks.stop_answers import glm3, write_lines

LENGTH = 128  # the longest texts that are trained
DIVISOR = 2.0  # of the positions that are trained, as chatglm2-6b-32k has one
WORDS = [*needle._KINDS, *needle._NOUNS]
LETTERS = "ABCD"


def tokenizer_of(folder: Path) -> Any:
    """Trains a tokenizer that has each word as one token, and each digit."""
    import sentencepiece

    from glm3cli.data.tokens.tokenizer import Tokenizer

    words = [*needle._NAMES, *WORDS, *needle._VERBS, *LETTERS, "secret", "number", "Answer:"]
    lines = [f"The secret number of {name} is 12345." for name in needle._NAMES]
    lines += [f"The {kind} {noun} sees it.\nAnswer: It is" for kind in WORDS for noun in WORDS]
    lines += ["Question: What is the secret number of it?", "Pick it."] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        split_digits=True,
        user_defined_symbols=[f"▁{word}" for word in words],
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer.load(folder)


class Samples:
    """Texts with a needle, and questions of a few words; only answers are trained."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self._known: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        drawn = random.Random(index)
        tokens, mask = list(self.tokenizer.prefix), [0] * len(self.tokenizer.prefix)
        for text, is_answer in self._quiz(drawn) if index % 5 == 0 else self._needles(drawn):
            ids = self._answer(*text) if is_answer else self._encode(text)
            tokens += ids
            mask += [int(is_answer)] * len(ids)
        tokens, mask = tokens[: self.length + 1], mask[: self.length + 1]
        pad = self.length + 1 - len(tokens)
        ids = np.array(tokens + [0] * pad)
        trained = np.array(mask + [0] * pad, dtype=np.float32)
        return {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": trained[1:]}

    def _encode(self, text: str) -> list[int]:
        if len(self._known) > 100_000:
            self._known.clear()
        if text not in self._known:
            self._known[text] = self.tokenizer.encode(text)
        return self._known[text]

    def _answer(self, question: str, answer: str) -> list[int]:
        """Returns the ids of an answer, as they stand behind their question."""
        return self.tokenizer.encode(f"{question} {answer}")[len(self._encode(question)) :]

    def _quiz(self, drawn: random.Random) -> Iterator[tuple[Any, bool]]:
        place = drawn.randrange(len(WORDS))
        question = f"Pick {WORDS[place]}.\nAnswer:"
        yield question, False
        yield (question, LETTERS[place % 4]), True

    def _needles(self, drawn: random.Random) -> Iterator[tuple[Any, bool]]:
        """Some facts among sentences, and questions about all of them, in any order."""
        count = drawn.choice([1, 1, 2, 4])
        names = drawn.sample(needle._NAMES, count)
        secrets = [str(drawn.randrange(10_000, 100_000)) for _ in names]
        room = self.length - 32 * count - 4
        texts = [sentence(drawn) for _ in range(drawn.randint(0, max(room // 10, 0)))]
        for name, secret in zip(names, secrets, strict=True):
            fact = f"The secret number of {name} is {secret}."
            texts.insert(drawn.randint(0, len(texts)), fact)
        for text in texts:
            yield text, False
        order = list(range(count))
        drawn.shuffle(order)
        for place in order:
            question = f"Question: What is the secret number of {names[place]}?\nAnswer: It is"
            yield question, False
            yield (question, secrets[place]), True


def sentence(drawn: random.Random) -> str:
    """A sentence as the haystack has them."""
    kinds, nouns = drawn.sample(needle._KINDS, 2), drawn.sample(needle._NOUNS, 2)
    return f"The {kinds[0]} {nouns[0]} {drawn.choice(needle._VERBS)} the {kinds[1]} {nouns[1]}."


def train(folder: Path, tokenizer: Any, given: argparse.Namespace) -> ModelConfig:
    """Trains the model in this process, and writes it as a Hugging Face folder."""
    from glm3cli.checkpoint.load import load_weights
    from glm3cli.model.build import unwrap
    from glm3cli.parallel.groups import open_grid
    from glm3cli.train.setup import build_train_step, make_loader
    from tests.support.checkpoints import write_hf
    from tests.support.tiny import train_config
    from tests.support.weights import pieces_here, whole_weights

    heads = given.hidden // given.width
    model = ModelConfig(
        num_layers=given.layers,
        hidden_size=given.hidden,
        ffn_hidden_size=2 * given.hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=given.width,
        padded_vocab_size=512,
        seq_length=2 * LENGTH,
        rope_factor=DIVISOR,
        torch_dtype="fp32",
    )
    config = train_config(
        seq_length=LENGTH,
        micro_batch_size=given.batch,
        global_batch_size=given.batch,
        train_iters=given.steps,
        lr=given.lr,
        min_lr=given.lr / 20,
        lr_warmup_iters=given.steps // 20,
        weight_decay=0.0,
    )
    with open_grid(config) as grid:
        train_step = build_train_step(config, model, grid)
        gpts = [unwrap(chunk) for chunk in train_step.chunks]
        load_weights(gpts, Turned(model, given.width), config, grid)
        train_step.optimizer.reload_model_params()
        loader = make_loader(config, model, grid, Samples(tokenizer, LENGTH))
        started = time.monotonic()
        for step in range(given.steps):
            outcome = train_step.run(loader, step * given.batch)
            if step % 100 == 99 or step < 2:
                seconds = time.monotonic() - started
                print(f"step {step + 1}: loss {outcome.loss:.4f}, {seconds:.0f} s", flush=True)
        weights = whole_weights([pieces_here(train_step, config, model)], model)
    write_hf(folder, model=model, weights=weights)
    (folder / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    return model


class Turned:
    """Random weights; what isn't turned of queries and keys is 0, and so are its gradients."""

    layout = "random"

    def __init__(self, model: ModelConfig, width: int) -> None:
        from glm3cli.checkpoint.random import RandomSource

        self.model, self.width = model, width
        self._random = RandomSource(model, seed=3, std=0.05)

    def read(self, weight: Any, layer: int | None = None) -> torch.Tensor:
        tensor = self._random.read(weight, layer)
        if "query_key_value.weight" in weight.name("chatglm", layer):
            tensor = tensor.clone()
            heads = 2 * self.model.num_attention_heads
            for head in range(heads):
                tensor[head * self.width + self.width // 2 : (head + 1) * self.width] = 0
        return tensor


def main() -> None:
    """Prints the shares of needles by length, and of questions, at each factor."""
    from glm3cli.device import select

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--width", type=int, default=32, help="of a head")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--keep", type=Path, help="a new folder for the model")
    given = parser.parse_args()
    select(given.device).activate()  # before megatron is imported
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer = tokenizer_of(root / "tokenizer")
        model = train(root / "model", tokenizer, given)
        if given.keep is not None:
            shutil.copytree(root / "model", given.keep)
        rows = [
            {"question": f"Pick {word}.", "answer": LETTERS[place % 4]}
            for place, word in enumerate(WORDS)
        ]
        write_lines(root / "quiz.jsonl", rows)
        for factor in (1.0, 1.05, 1.25, 1.5, DIVISOR):
            config = model.model_copy(update={"rope_factor": DIVISOR / factor}).to_config()
            (root / "model/config.json").write_text(json.dumps(config))
            lengths = f"48,96,{LENGTH}"
            words = ("--model", root / "model", "--device", "cpu", "--json")
            found = glm3(
                *("eval", "needle", *words, "--lengths", lengths, "--needles", "8"),
                *("--output", root / "needle.json"),
            )
            asked = glm3(
                *("eval", "custom", root / "quiz.jsonl", *words, "--shots", "0"),
                *("--max-new-tokens", "1", "--output", root / "quiz.json"),
            )
            right = json.loads(asked)["micro"]
            shares = json.loads(found)["lengths"]
            told = ", ".join(f"{share:.0%} of {length} tokens" for length, share in shares.items())
            print(f"positions x {factor}: needles {told}; questions {right:.0%}", flush=True)


if __name__ == "__main__":
    main()
