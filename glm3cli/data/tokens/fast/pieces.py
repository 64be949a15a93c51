"""The parts of a tokenizer.json that encodes as a sentencepiece model does.

It has the same BPE, with merges rebuilt from the pieces, whose scores are their ranks.
"""

from collections.abc import Sequence
from typing import Any

import sentencepiece

from glm3cli.data.tokens.formats.templates import MARK
from glm3cli.data.tokens.vocabulary.pieces import Pieces, only_prepends_space
from glm3cli.data.tokens.vocabulary.pieces_json import SPACE


def obstacle(vocabulary: Pieces, special: Sequence[str]) -> str | None:
    """Returns why a tokenizer.json can't encode as the model does, or None if it can.

    Args:
        vocabulary: The model.
        special: The names of the special tokens.
    """
    return _obstacle(vocabulary.pieces, _normal(vocabulary.pieces), special)


def parts(vocabulary: Pieces) -> dict[str, Any]:
    """Returns the parts of the tokenizer.json that depend on the model."""
    pieces = vocabulary.pieces
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"String": MARK}, "content": ""},
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces.id_to_piece(pieces.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())},
            "merges": _merges(pieces, _normal(pieces)),
        },
    }


def controls(vocabulary: Pieces) -> dict[int, str]:
    """Returns the pieces that `tokenizers` finds in text by their spelling: `<unk>`, `</s>`."""
    return {i: vocabulary.name(i) for i in (vocabulary.pieces.unk_id(), vocabulary.end)}


def _normal(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """Returns the pieces that stand for text (no bytes, no control pieces), with their ids."""
    return {
        pieces.id_to_piece(i): i
        for i in range(pieces.get_piece_size())
        if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i))
    }


def _obstacle(
    pieces: sentencepiece.SentencePieceProcessor, normal: dict[str, int], special: Sequence[str]
) -> str | None:
    """Returns why a tokenizer.json can't encode as the model does, or None if it can.

    It tries out what the model does, since sentencepiece doesn't let its settings be read.
    """
    scores = [pieces.get_score(i) for i in normal.values()]
    # A Unigram model's scores are logarithms; those of pieces that a user has defined are all 0.
    if any(score != int(score) for score in scores) or len({*scores}) < len(scores):
        return "it is no plain BPE model"
    if sum(map(pieces.is_byte, range(pieces.get_piece_size()))) != 256:
        return "it has no byte fallback"
    if not only_prepends_space(pieces):
        return "it changes text or its spaces"
    if any("\n" in name for name in normal):
        return "it has pieces with line breaks"
    names = [name for name in special if name in normal]
    if names:
        return f"it has pieces that are called as special tokens: {', '.join(names)}"
    return None


def _merges(
    pieces: sentencepiece.SentencePieceProcessor, normal: dict[str, int]
) -> list[list[str]]:
    """Returns every pair of pieces that joins to a third, by falling score of the third."""
    found = [
        (-pieces.get_score(i), normal[name[:k]], normal[name[k:]], [name[:k], name[k:]])
        for name, i in normal.items()
        for k in range(1, len(name))
        if name[:k] in normal and name[k:] in normal
    ]
    return [parts for *_, parts in sorted(found)]
