"""A model that says the same words whatever it is asked, made of weights as any other model."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from glm3cli.checkpoint.convert.random_model import write_random_model
from glm3cli.checkpoint.random import RandomSource
from glm3cli.config.model import ModelConfig
from glm3cli.data.tokens.tokenizer import Tokenizer

# A tool call in four tokens, since a chain has none twice.
CALL = ("get_weather", "\n```python\n", "tool_call(city='北京', days=3)", "\n```")
# Words without end.
ENDLESS = ("wind", "rain", "snow", "wind")
_ROLES = ("<|user|>", "<|observation|>", "<|assistant|>")

_MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    padded_vocab_size=512,
    seq_length=4096,
    torch_dtype="fp32",
)


class ChainSource(RandomSource):
    """Weights that answer each token by the one after it in a chain.

    Attention and MLP are 0. The n-th token of the chain has the n-th unit vector as embedding, to
    which the output layer answers with the next token.
    """

    def __init__(self, chain: Sequence[int]) -> None:
        super().__init__(_MODEL, seed=1, std=0.1)
        self._chain = list(chain)

    def read(self, weight: Any, layer: int | None = None) -> torch.Tensor:
        tensor = torch.zeros(weight.shape(self.model))
        if "norm" in weight.logical:
            tensor += 1
        numbers = {token: number for number, token in enumerate(dict.fromkeys(self._chain))}
        if weight.logical == "embedding":
            for token, number in numbers.items():
                tensor[token, number] = 1
        if weight.logical == "output":
            for token, following in itertools.pairwise(self._chain):
                tensor[following, numbers[token]] = 1
        return tensor


def write_chain_model(folder: Path, *pieces: str) -> Path:
    """Writes a model that answers with `pieces`, each of them one token, and returns its folder.

    The role tokens and bytes such as <0xE4> may be among them. Without a role at the end, `</s>`
    ends the answer, or nothing does if the last piece was there before.
    """
    folder.mkdir()
    words = [piece for piece in pieces if piece not in _ROLES and not piece.startswith("<0x")]
    tokenizer = _write_tokenizer(folder / "tokens", words)
    names = tokenizer.vocabulary.pieces
    ids = [tokenizer.special(p) if p in _ROLES else int(names.piece_to_id(p)) for p in pieces]
    assert names.unk_id() not in ids
    is_open = pieces[-1] in _ROLES or pieces[-1] in pieces[:-1]
    chain = [tokenizer.special("<|assistant|>"), *ids, *([] if is_open else [tokenizer.eos_id])]
    write_random_model(folder / "model", ChainSource(chain), folder / "tokens")
    return folder / "model"


def _write_tokenizer(folder: Path, pieces: Sequence[str]) -> Tokenizer:
    """Writes a tokenizer of bytes that has `pieces` as tokens, too."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        user_defined_symbols=list(dict.fromkeys(pieces)),
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer.load(folder)
