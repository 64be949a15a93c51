"""A small tokenizer of GLM-4's kind (byte pairs with ranks), made on the spot."""

import functools
import tempfile
from pathlib import Path

from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.demo.ranks import train_ranks, write_ranks
from tests.support.tiny_tokenizer import WORDS


@functools.cache
def tiny_ranks_folder() -> Path:
    """Returns a folder that has a tokenizer.model of some 350 tokens."""
    words = WORDS.split()
    lines = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    folder = Path(tempfile.mkdtemp(prefix="glm3-ranks-"))
    write_ranks(folder / "tokenizer.model", train_ranks(lines, 350))
    return folder


def tiny_ranks() -> Tokenizer:
    """Returns the tokenizer in the folder of `tiny_ranks_folder`."""
    return Tokenizer.load(tiny_ranks_folder())
