"""Finds the samples of instructions that a sequence length cuts, or leaves nothing to train on.

Files of `glm3 preprocess` have such samples if they were made for a longer sequence length, or
without one. A sample without a trained token would only take the place of another.
"""

from dataclasses import dataclass

import numpy as np

from glm3cli.data.indexed import read_lengths, read_tokens
from glm3cli.data.kinds import ANSWERS, DataKind
from glm3cli.data.tokens.messages import IGNORED_LABEL
from glm3cli.errors import DataError


@dataclass(frozen=True)
class Fitting:
    """The documents of a split that can be trained.

    Attributes:
        kept: The numbers of the documents with a token to train, int64 [number of them].
        cut: How many of these documents are longer than a sample, and lose their ends.
        empty: How many documents have no token to train.
    """

    kept: np.ndarray
    cut: int
    empty: int


def fitting(prefix: str, documents: range, seq_length: int, kind: DataKind = ANSWERS) -> Fitting:
    """Finds the documents of a split that have a token to train.

    A sample has `seq_length` positions, each of which predicts the next token: so it holds
    `seq_length` + 1 tokens of a document, and trains all of them but the first.

    Args:
        prefix: The prefix of the data set.
        documents: The numbers of the documents of the split.
        seq_length: The length of a sample, in tokens.
        kind: The kind of data.

    Raises:
        DataError: A file is damaged.
    """
    name = kind.key_file(prefix, "labels")
    named = f"--data {prefix}"
    lengths, labels = read_lengths(name, named), read_tokens(name, named)
    ends = np.cumsum(lengths, dtype=np.int64)[documents.start : documents.stop]
    lengths = lengths[documents.start : documents.stop].astype(np.int64)
    starts = ends - lengths
    ends = starts + np.minimum(lengths, seq_length + 1)
    is_trained = np.zeros(len(documents), dtype=bool)
    several = np.flatnonzero(lengths > 1)
    # Nearly all samples end with a trained token; only the others are read as a whole.
    is_trained[several] = labels[ends[several] - 1] != IGNORED_LABEL
    for place in several[~is_trained[several]].tolist():
        part = labels[starts[place] + 1 : ends[place]]
        is_trained[place] = bool((part != IGNORED_LABEL).any())
    kept = np.flatnonzero(is_trained)
    cut = int((lengths[kept] > seq_length + 1).sum())
    return Fitting(kept + documents.start, cut, len(documents) - len(kept))


def trainable(
    prefix: str, documents: range, seq_length: int, split: str, kind: DataKind = ANSWERS
) -> np.ndarray:
    """Returns the numbers of the documents of a split that have a token to train.

    Args:
        prefix: The prefix of the data set.
        documents: The numbers of the documents of the split, at least one.
        seq_length: The length of a sample, in tokens.
        split: The name of the split, for the error message.
        kind: The kind of data.

    Raises:
        DataError: A file is damaged, or no document has a token to train.
    """
    kept = fitting(prefix, documents, seq_length, kind).kept
    if not len(kept):
        raise DataError(
            f"--data {prefix}: none of its {len(documents):,} samples for {split} has a token to "
            f"train within --seq-length {seq_length}",
            "give a larger --seq-length, or preprocess the data for this one",
        )
    return kept
