"""A small tokenizer of ChatGLM3's kind (BPE, byte fallback, no normalisation), made on the spot."""

import functools
import io
import tempfile
from pathlib import Path

import sentencepiece

from glm3cli.data.tokens.tokenizer import Tokenizer

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards box 你好 世界 北京 天气 很 好"
)


@functools.cache
def tiny_tokenizer_folder() -> Path:
    """Returns a folder that has a tokenizer.model of some 400 pieces."""
    words = WORDS.split()
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
        minloglevel=2,
    )
    folder = Path(tempfile.mkdtemp(prefix="glm3-tokenizer-"))
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def tiny_tokenizer() -> Tokenizer:
    """Returns the tokenizer in the folder of `tiny_tokenizer_folder`."""
    return Tokenizer.load(tiny_tokenizer_folder())
