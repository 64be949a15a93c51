"""Toy exams, an engine that answers by arithmetic, and a tokenizer that knows the letters."""

import csv
import functools
import hashlib
import io
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from glm3cli.config.evaluation import EvalConfig, MmluConfig
from glm3cli.config.model import ModelConfig
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.evals.results import EvalResult
from glm3cli.evals.runner import run_benchmark
from glm3cli.evals.suites.mmlu import suite_of
from glm3cli.infer.requests import Generation, Request
from glm3cli.infer.scoring import NextToken
from glm3cli.parallel.groups import Grid
from tests.support.checkpoints import random_weights, write_hf

EXAM_MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    padded_vocab_size=512,
    seq_length=2048,
    torch_dtype="fp32",
)

Row = tuple[str, str, str, str, str, str]

_TEXT = (
    "The following are multiple choice questions (with answers) about subjects. "
    "What is it? Answer: A Answer: B Answer: C Answer: D one two three four five 答案 是 题目"
)


@functools.cache
def exam_tokenizer_folder() -> Path:
    """A folder with a tokenizer.model in which ` A` to ` D` are single pieces."""
    words = _TEXT.split()
    lines = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        user_defined_symbols=[f"▁{letter}" for letter in "ABCDEF"],
        minloglevel=2,
    )
    folder = Path(tempfile.mkdtemp(prefix="glm3-tokenizer-"))
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def exam_tokenizer() -> Tokenizer:
    """The tokenizer in that folder."""
    return Tokenizer.load(exam_tokenizer_folder())


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Writes a CSV file and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def write_exam(folder: Path, sizes: dict[str, int], num_shots: int = 5) -> Path:
    """MMLU in small: `sizes` questions of each subject, of various lengths."""
    for subject, size in sizes.items():
        for split, number in (("test", size), ("dev", num_shots)):
            rows = [_row(subject, split, i) for i in range(number)]
            write_csv(folder / split / f"{subject}_{split}.csv", rows)
    return folder


def _row(subject: str, split: str, i: int) -> Row:
    text = f"What is {subject} {split} {i}?" + " one two" * (i % 4)
    return (text, "one", "None", "NA", f"{i}", "ABCD"[i % 4])


def write_exam_model(folder: Path, **changes: int) -> Path:
    """A Hugging Face folder of random weights with the exam's tokenizer."""
    model = EXAM_MODEL.model_copy(update=changes)
    weights = {
        name: tensor if tensor.dim() == 1 else tensor * 0.2
        for name, tensor in random_weights(model, torch.float32).items()
    }
    write_hf(folder, model=model, weights=weights)
    shutil.copy(exam_tokenizer_folder() / "tokenizer.model", folder)
    return folder


def one_rank() -> Grid:
    """The grid of a process that is alone."""
    return Grid(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, None, None, None, None, ExitStack())


class FakeEngine:
    """An `Engine` whose numbers depend on a prompt's tokens alone.

    Attributes:
        batches: The prompts of each call so far.
        forgotten: How many calls there had been each time it was told to forget.
        seeds: The seeds of the requests so far.
        on_call: Called before each forward pass.
    """

    def __init__(
        self, tokenizer: Tokenizer, seq_length: int = 4096, grid: Grid | None = None
    ) -> None:
        self.model = ModelConfig(
            num_layers=1,
            hidden_size=8,
            ffn_hidden_size=8,
            num_attention_heads=2,
            num_query_groups=2,
            kv_channels=4,
            padded_vocab_size=tokenizer.vocab_size,
            seq_length=seq_length,
        )
        self.grid = grid or one_rank()
        self.batches: list[list[tuple[int, ...]]] = []
        self.forgotten: list[int] = []
        self.seeds: list[int] = []
        self.on_call: Callable[[], None] = lambda: None
        self.script: list[int] = []

    def limit(self, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size

    def forget(self) -> None:
        self.forgotten.append(len(self.batches))

    def ask_next(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> Callable[[], list[NextToken]]:
        self.on_call()
        self.batches.append([tuple(prompt) for prompt in prompts])
        return lambda: [self._next(prompt, candidates) for prompt in prompts]

    def _next(self, prompt: Sequence[int], candidates: Sequence[int]) -> NextToken:
        scores = [score(prompt, token) for token in candidates]
        return NextToken(scores, likeliest(prompt, self.model.padded_vocab_size))

    def ask_continuations(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> Callable[[], list[tuple[float, bool]]]:
        self.batches.append([tuple(context) for context in contexts])
        results = []
        for context, continuation in zip(contexts, continuations, strict=True):
            seen, total = list(context), 0.0
            assert continuation
            for token in continuation:
                total += score(seen, token)
                seen.append(token)
            results.append((total, total > -8.0))
        return lambda: results

    def answer(self, requests: Sequence[Request]) -> list[Generation]:
        """Says the words of `script` to every prompt, one by one."""
        self.batches.append([tuple(request.prompt) for request in requests])
        self.seeds += [request.seed for request in requests]
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Generation:
        said = Generation()
        for word in self.script[: request.max_new_tokens]:
            if word in request.stop_ids:
                break
            said.token_ids.append(word)
            if request.is_end is not None and request.is_end(said.token_ids):
                break
        return said


class FakeModel:
    """An opened model around an engine."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.tokenizer = exam_tokenizer()

    def __enter__(self) -> "FakeModel":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def score(prompt: Sequence[int], candidate: int) -> float:
    """A made-up log-probability, exact in fp32."""
    digest = hashlib.sha256(repr((list(prompt), candidate)).encode()).digest()
    return -16.0 * struct.unpack("<H", digest[:2])[0] / 65536


def likeliest(prompt: Sequence[int], vocab_size: int) -> int:
    """A made-up token."""
    return int(-score(prompt, -1) * 4096) % vocab_size


def run_on_rank(options: dict[str, Any]) -> EvalResult:
    """A whole benchmark run on this rank, for the pool of ranks."""
    config = MmluConfig.parse(options)
    return run(config)


def run(config: EvalConfig, **more: Any) -> EvalResult:
    """Runs MMLU as the command does."""
    suite = suite_of(config.protocol if isinstance(config, MmluConfig) else "logits")
    result = run_benchmark(config, suite, **more)
    assert result is not None
    return result
