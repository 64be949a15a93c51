"""Rebuilds a sentencepiece model from a tokenizer.json that has its pieces.

transformers saves such a file alone when it saves the tokenizer of a `glm` export again. The model
is written in sentencepiece's own format (sentencepiece_model.proto), in the few fields that matter.
"""

import re
import struct
from collections.abc import Mapping
from typing import Any

SPACE = "\u2581"  # what sentencepiece writes for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# SentencePiece.Type of the format.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE_PIECE = 1, 2, 3, 6
# TrainerSpec: model_type (3) BPE, byte_fallback (35) true.
_BPE = b"\x12\x05\x18\x02\x98\x02\x01"
# NormalizerSpec: add_dummy_prefix (3) true, remove_extra_whitespaces (4) false,
# escape_whitespaces (5) true.
_ONLY_PREPENDS = b"\x1a\x06\x18\x01\x20\x00\x28\x01"
# Behind a model it counts more than what is in it: add_dummy_prefix false.
PREPENDS_NOTHING = b"\x1a\x02\x18\x00"


def has_pieces(content: Any) -> bool:
    """Returns whether the content of a tokenizer.json has pieces of text and bytes beside them."""
    model = content.get("model") if isinstance(content, Mapping) else None
    return isinstance(model, Mapping) and model.get("byte_fallback") is True


def prepends_space(content: Any) -> bool:
    """Returns whether a tokenizer.json puts a space in front of a text as it normalises it."""
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step == {"type": "Prepend", "prepend": SPACE} for step in steps)


def model_of(content: Any) -> bytes:
    """Returns the sentencepiece model that gives the ids of a tokenizer.json with pieces.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: No sentencepiece model does, since its
            merges aren't those of every pair of pieces by the ids of what they join to, or it
            changes the text otherwise.
    """
    vocab: Mapping[str, int] = content["model"]["vocab"]
    names = sorted(vocab, key=vocab.__getitem__)
    types = [_type(i, name) for i, name in enumerate(names)]
    is_whole = all(vocab[name] == i for i, name in enumerate(names))
    if not is_whole or types.count(_BYTE_PIECE) != 256:
        raise ValueError("it lacks ids or bytes")
    if content.get("pre_tokenizer") is not None or not prepends_space(content):
        raise ValueError("it changes the text otherwise")
    normal = {name for name, kind in zip(names, types, strict=True) if kind == _NORMAL}
    merges = content["model"]["merges"]
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    made = [vocab[first + second] for first, second in pairs]
    if made != sorted(made) or set(pairs) != _all_pairs(normal):
        raise ValueError("its merges are not those of its pieces")
    pieces = map(_piece, range(len(names)), names, types)
    return b"".join(pieces) + _BPE + _ONLY_PREPENDS


def _all_pairs(names: set[str]) -> set[tuple[str, ...]]:
    """Returns every pair of pieces that joins to a third."""
    return {
        (name[:k], name[k:])
        for name in names
        for k in range(1, len(name))
        if name[:k] in names and name[k:] in names
    }


def _type(i: int, name: str) -> int:
    """Returns the type of a piece: those of the first three ids are `<unk>`, `<s>` and `</s>`."""
    if i < 3:
        return _CONTROL if i else _UNKNOWN
    return _BYTE_PIECE if _BYTE.fullmatch(name) else _NORMAL


def _piece(i: int, name: str, kind: int) -> bytes:
    """Returns a SentencePiece of the format: its piece (1), score (2) and type (3).

    Merges go by falling score, as they go by rising id here.
    """
    spelled = name.encode()
    score = struct.pack("<f", -float(i) if kind == _NORMAL else 0.0)
    content = b"\x0a" + _varint(len(spelled)) + spelled + b"\x15" + score + b"\x18" + bytes([kind])
    return b"\x0a" + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    """Returns a number in groups of seven bits, the lowest first."""
    groups = b""
    while number > 0x7F:
        groups += bytes([number & 0x7F | 0x80])
        number >>= 7
    return groups + bytes([number])
