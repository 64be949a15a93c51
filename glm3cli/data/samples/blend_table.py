"""Counts what each data set contributes to a training: documents, tokens, samples and epochs.

Only the indices of the files are read, and megatron isn't imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm3cli.data.indexed import read_lengths
from glm3cli.data.kinds import ANSWERS, DataKind
from glm3cli.data.packs import best_fit_decreasing, sample_sizes
from glm3cli.data.prefixes import Blend
from glm3cli.data.samples.fitting import fitting, trainable
from glm3cli.data.samples.splits import document_ranges


@dataclass(frozen=True)
class DataSource:
    """A data set of a blend and what a training takes from it.

    Attributes:
        prefix: The prefix of the data set.
        weight: Its share of the samples, 0 to 1.
        documents: The number of documents in its training split.
        tokens: The number of tokens in its training split.
        samples: About how many samples the training takes from it.
        epochs: How many times the training goes through it.
        cut: How many of its samples for training and validation are longer than the sequence
            length, and lose their ends.
        empty: How many of them have no token to train within the sequence length. They are left
            out, and aren't among the documents.
        size: The number of samples of one epoch, packs where documents are packed; of texts, the
            number of tokens.
    """

    prefix: str
    weight: float
    documents: int
    tokens: int
    samples: int
    epochs: float
    cut: int = 0
    empty: int = 0
    size: int = 0


def data_sources(
    blend: Blend,
    kind: DataKind,
    split: str,
    seq_length: int,
    num_samples: int,
    *,
    packing: bool = False,
) -> list[DataSource]:
    """Counts what each data set of a blend contributes to a training.

    Args:
        blend: The data sets and their weights.
        kind: The kind of data.
        split: The proportions of training, validation and test documents, such as "949,50,1".
        seq_length: The length of a sample, in tokens.
        num_samples: The number of samples that the training takes from all data sets together.
        packing: Whether documents are packed: a pack is one sample.

    Raises:
        DataError: A file is damaged, or a split has no document, or none with a token to train.
    """
    counts, sizes = [], []
    for prefix in blend.prefixes:
        lengths = read_lengths(kind.main_file(prefix), f"--data {prefix}")
        train, valid = document_ranges(len(lengths), split, prefix, needs_valid=False)
        cut = empty = 0
        in_training = lengths[train.start : train.stop]
        if kind is ANSWERS:
            in_training = lengths[trainable(prefix, train, seq_length, "training", kind)]
            both = fitting(prefix, range(train.start, valid.stop), seq_length, kind)
            cut, empty = both.cut, both.empty
        tokens = int(in_training.sum(dtype=np.int64))
        counts.append((prefix, len(in_training), tokens, cut, empty))
        whole = sample_sizes(in_training, seq_length)
        wholes = len(best_fit_decreasing(whole, seq_length)) if packing else len(in_training)
        sizes.append(kind.default_weight(wholes, tokens))
    weights = np.array(blend.weights or sizes, dtype=np.float64)
    shares = (weights / weights.sum()).tolist()
    return [
        DataSource(
            prefix,
            share,
            documents,
            tokens,
            samples=round(share * num_samples),
            epochs=kind.epochs(share * num_samples, seq_length, size),
            cut=cut,
            empty=empty,
            size=size,
        )
        for (prefix, documents, tokens, cut, empty), size, share in zip(
            counts, sizes, shares, strict=True
        )
    ]


def table(sources: Sequence[DataSource]) -> str:
    """Returns a table of the data sets, one line each under a line of column names.

    Lines below it say which data sets have samples that are cut or left out.
    """
    width = max(len("data"), *(len(source.prefix) for source in sources))
    lines = [
        f"{'data':{width}}  {'weight':>7}  {'documents':>12}  {'tokens':>15}  {'samples':>11}  "
        f"{'epochs':>8}"
    ]
    lines += [
        f"{s.prefix:{width}}  {s.weight:7.2%}  {s.documents:12,}  {s.tokens:15,}  "
        f"{s.samples:11,}  {s.epochs:8.2f}"
        for s in sources
    ]
    for source in sources:
        if source.empty:
            lines.append(
                f"{source.prefix}: {source.empty:,} samples have nothing to train on within "
                "--seq-length, and are left out"
            )
        if source.cut:
            lines.append(
                f"{source.prefix}: {source.cut:,} samples are longer than --seq-length, and lose "
                "their ends; `glm3 preprocess --seq-length` would keep their end tokens"
            )
    return "\n".join(lines)
