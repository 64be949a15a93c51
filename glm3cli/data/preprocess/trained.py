"""Reads which turns of a conversation are trained."""

import re
from typing import Any

from glm3cli.data.preprocess.fields import Row, RowError, shown, truth_of

# The keys by which a turn says whether it is trained: ChatGLM3 and ms-swift have `loss`, OpenAI
# `weight`, axolotl `train` and `training`, ms-swift also `loss_scale`.
FLAGS = ("loss", "train", "training", "trainable", "weight", "loss_weight", "loss_scale")
# A key with one of these words seems to say it, too: it is refused rather than passed over.
_WORDS = {"loss", "train", "trained", "training", "trainable", "weight", "mask", "masked"}


def is_trained(turn: Row, place: str) -> bool:
    """Returns whether a turn is trained, if it is an answer: true unless it says otherwise.

    Args:
        turn: The turn.
        place: Which field of the row it is, for error messages.

    Raises:
        RowError: The turn says it in a way that isn't known, or says both.
    """
    said = {}
    for key, value in turn.items():
        if value is None:
            continue
        if key in FLAGS:
            said[key] = _truth(value, f"{place}.{key}")
        elif _WORDS & set(re.split(r"[\W_]+", key.lower())):
            raise RowError(f"{place}.{key}", f"isn't known; say loss, true or false, {_OR}")
    if len(set(said.values())) > 1:
        both = ", ".join(f"{key} {turn[key]!r}" for key in said)
        raise RowError(place, f"expected turns that are trained or not, got {both}")
    return all(said.values())


def _truth(value: Any, place: str) -> bool:
    truth = truth_of(value)
    if truth is None:
        expected = "expected true or false, or 1 or 0: a turn is trained or not, not in part"
        raise RowError(place, f"{expected}; got {shown(value)}")
    return truth


_OR = f"or one of {', '.join(FLAGS[1:])}"
