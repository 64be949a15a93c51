"""Makes what `glm3 demo` works on: documents, a tokenizer, a model's shape, a task, and recipes.

Everything comes from the package's own files and fixed seeds, so that each run has the same data.
The steps in `chain` call these functions; nothing here knows how a model is trained or run.
"""

import io
import json
import random
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from glm3cli.config.model import ModelConfig
from glm3cli.demo.quiz import facts, quiz_documents
from glm3cli.demo.words import OPPOSITES

NUM_PIECES = 1000  # size of the sentencepiece vocabulary; the nine special tokens follow it
_NUM_HELD_OUT_PAIRS = 20
_NUM_QUIZ_DOCUMENTS = 900
_NUM_FACT_DOCUMENTS = 200
_SEED = 1

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    padded_vocab_size=1024,
    seq_length=128,
    torch_dtype="fp32",
)
# Standard deviation of all random weight matrices. So narrow a model learns far more slowly from
# the usual 0.02; norms start at 1 and biases at 0.
INIT_METHOD_STD = 0.1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of one training run of the demo; options that aren't here keep their defaults.

    The attributes are named as the options on the command line.

    Attributes:
        seq_length: Tokens of one sample.
        micro_batch_size: Samples that one rank runs at once.
        global_batch_size: Samples of one optimizer step, over all ranks.
        train_iters: Number of optimizer steps.
        lr: Highest learning rate.
        min_lr: Learning rate at the end of the decay.
        lr_warmup_iters: Number of steps with a rising learning rate.
        weight_decay: Decoupled weight decay of AdamW.
    """

    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    train_iters: int
    lr: float
    min_lr: float
    lr_warmup_iters: int
    weight_decay: float


# Pretraining reads one packed stream: `[gMASK] sop`, document, eos, and so on.
PRETRAIN = Recipe(
    seq_length=64,
    micro_batch_size=32,
    global_batch_size=32,
    train_iters=240,
    lr=1e-2,
    min_lr=4e-3,
    lr_warmup_iters=20,
    weight_decay=0.0,
)
# Finetuning reads one conversation in ChatGLM3's form per sample, with the loss on the answer.
FINETUNE = Recipe(
    seq_length=32,
    micro_batch_size=32,
    global_batch_size=32,
    train_iters=160,
    lr=5e-3,
    min_lr=5e-4,
    lr_warmup_iters=10,
    weight_decay=0.1,
)


def prose() -> list[str]:
    """Returns the paragraphs of the bundled text (corpus.txt)."""
    text = (Path(__file__).parent / "corpus.txt").read_text(encoding="utf-8")
    return text.strip().split("\n\n")


def pretrain_documents() -> list[str]:
    """Returns the documents of the pretraining, shuffled.

    They are the paragraphs of the bundled text, paragraphs of facts, and quiz documents.
    """
    rng = random.Random(_SEED)
    opposites, others = _opposite_facts(), facts()
    documents = prose() + quiz_documents(_NUM_QUIZ_DOCUMENTS, _SEED)
    documents += [
        " ".join(rng.sample(opposites, 3) + rng.sample(others, 6))
        for _ in range(_NUM_FACT_DOCUMENTS)
    ]
    rng.shuffle(documents)
    return documents


def _opposite_facts() -> list[str]:
    return [f"The opposite of {one} is {other}." for one, other in _opposites().items()]


def _opposites() -> dict[str, str]:
    return {one: other for pair in OPPOSITES for one, other in (pair, pair[::-1])}


def training_rows() -> list[dict[str, str]]:
    """Returns the rows of the finetuning, in alpaca form: give the opposites of two words."""
    return [_row(one, other) for pair in _word_pairs()[_NUM_HELD_OUT_PAIRS:] for one, other in pair]


def held_out_rows() -> list[dict[str, str]]:
    """Returns rows in the form of `training_rows`, about pairs of words that these don't have.

    Training has neither order of such a pair.
    """
    return [_row(one, other) for pair in _word_pairs()[:_NUM_HELD_OUT_PAIRS] for one, other in pair]


def _word_pairs() -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Returns the pairs of words that aren't opposites, shuffled, each pair in both orders."""
    opposites = _opposites()
    pairs = [pair for pair in combinations(opposites, 2) if opposites[pair[0]] != pair[1]]
    random.Random(_SEED).shuffle(pairs)
    return [(pair, (pair[1], pair[0])) for pair in pairs]


def call_rows(*, held_out: bool) -> list[dict[str, list[dict[str, Any]]]]:
    """Returns conversations in which a tool is called, about the pairs of words of the other rows.

    Args:
        held_out: Whether they are about the pairs that training doesn't have.
    """
    pairs = _word_pairs()
    chosen = pairs[:_NUM_HELD_OUT_PAIRS] if held_out else pairs[_NUM_HELD_OUT_PAIRS:]
    return [_call(one, other) for pair in chosen for one, other in pair]


def _call(one: str, other: str) -> dict[str, list[dict[str, Any]]]:
    call = {"name": "look_up", "arguments": json.dumps({"one": one, "other": other})}
    return {
        "messages": [
            {"role": "user", "content": f"Look up {one} and {other}."},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        ]
    }


def _row(one: str, other: str) -> dict[str, str]:
    opposites = _opposites()
    return {
        "instruction": f"Give the opposites of {one} and {other}.",
        "input": "",
        "output": f"{opposites[one]} and {opposites[other]}",
    }


def tokenizer_texts() -> list[str]:
    """Returns the texts that a tokenizer is trained on."""
    rows = [f"{row['instruction']}\n{row['output']}" for row in training_rows()[::8]]
    return prose() + (_opposite_facts() + facts()) * 3 + pretrain_documents()[:300] + rows


def train_tokenizer(folder: Path) -> None:
    """Trains a tokenizer on the demo's texts, and writes its files into `folder`.

    The files are tokenizer.model and tokenizer_config.json. The tokenizer has the traits of
    ChatGLM3's: byte fallback, single digits, no normalization, and a space in front of the text.
    """
    import sentencepiece

    texts = tokenizer_texts()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.splitlines() if line]),
        model_writer=model,
        model_type="bpe",
        vocab_size=NUM_PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    config = {
        "name_or_path": "glm3-demo",
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
