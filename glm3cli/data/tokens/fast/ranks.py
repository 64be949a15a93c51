"""The parts of a tokenizer.json that encodes as byte pairs with ranks do.

Each byte is written as one character, and every pair of tokens that joins to a third is a merge, in
the order of the third ones.
"""

from typing import Any

from glm3cli.data.tokens.formats.templates import MARK
from glm3cli.data.tokens.vocabulary.ranks import BYTES, Ranks

_CHARACTERS = {byte: character for character, byte in BYTES.items()}


def parts(vocabulary: Ranks) -> dict[str, Any]:
    """Returns the parts of the tokenizer.json that depend on the ranks."""
    pattern = {"Regex": vocabulary.pattern}
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": MARK}, "content": ""},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # tiktoken, too, takes a word that is a token as it is
            "vocab": {_spelled(token): i for token, i in vocabulary.ranks.items()},
            "merges": _merges(vocabulary.ranks),
        },
    }


def _merges(ranks: dict[bytes, int]) -> list[list[str]]:
    """Returns every pair of tokens that joins to a third, by the rank of the third."""
    found = [
        (rank, ranks[token[:k]], ranks[token[k:]], [_spelled(token[:k]), _spelled(token[k:])])
        for token, rank in ranks.items()
        for k in range(1, len(token))
        if token[:k] in ranks and token[k:] in ranks
    ]
    return [pair for *_, pair in sorted(found)]


def _spelled(token: bytes) -> str:
    """Returns a token with a character for each byte."""
    return "".join(map(_CHARACTERS.__getitem__, token))
