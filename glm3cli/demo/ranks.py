"""Trains a small vocabulary of GLM-4's kind: byte pairs with ranks, in tiktoken's form."""

import base64
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from glm3cli.config.family.members import GLM4


def train_ranks(texts: Iterable[str], size: int) -> list[bytes]:
    """Returns the tokens of a vocabulary in the order of their ranks.

    They are all bytes, and the pairs that are the most frequent ones when all earlier ones have
    been joined (Sennrich et al. 2016, "Neural machine translation of rare words with subword
    units"); of equally frequent ones the first by their bytes.

    Args:
        texts: The texts to count in.
        size: The number of tokens, if the texts have as many.
    """
    import regex

    counts = Counter(word for text in texts for word in regex.findall(GLM4.pattern, text))
    words = {tuple(bytes([b]) for b in word.encode()): n for word, n in counts.items()}
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        pairs = Counter[tuple[bytes, bytes]]()
        for word, n in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(best[0] + best[1])
        words = {_joined(word, best): n for word, n in words.items()}
    return tokens


def write_ranks(path: Path, tokens: Sequence[bytes]) -> None:
    """Writes a vocabulary as the tokenizer.model of GLM-4 is written."""
    lines = (base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    path.write_bytes(b"".join(lines))


def _joined(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    """Returns a word in which a pair is joined wherever it stands."""
    parts: list[bytes] = []
    for part in word:
        if parts and (parts[-1], part) == pair:
            parts[-1] += part
        else:
            parts.append(part)
    return tuple(parts)
