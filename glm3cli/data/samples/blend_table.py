"""Counts what each data set contributes to a training: documents, tokens, samples and epochs.

Only the indices of the files are read, and megatron isn't imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm3cli.data.indexed import read_lengths
from glm3cli.data.kinds import DataKind
from glm3cli.data.packs import best_fit_decreasing, sample_sizes
from glm3cli.data.prefixes import Blend
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
    """

    prefix: str
    weight: float
    documents: int
    tokens: int
    samples: int
    epochs: float


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
        DataError: An index is damaged, or a split has no document.
    """
    counts, sizes = [], []
    for prefix in blend.prefixes:
        lengths = read_lengths(kind.main_file(prefix), prefix)
        train, _ = document_ranges(len(lengths), split, prefix, needs_valid=False)
        in_training = lengths[train.start : train.stop]
        tokens = int(in_training.sum(dtype=np.int64))
        counts.append((prefix, len(in_training), tokens))
        whole = sample_sizes(in_training, seq_length)
        wholes = len(best_fit_decreasing(whole, seq_length)) if packing else len(in_training)
        sizes.append(kind.default_weight(wholes, tokens))
    weights = np.array(blend.weights or sizes, dtype=np.float64)
    shares = (weights / weights.sum()).tolist()
    found = []
    for (prefix, documents, tokens), size, share in zip(counts, sizes, shares, strict=True):
        samples = share * num_samples
        epochs = kind.epochs(samples, seq_length, size)
        found.append(DataSource(prefix, share, documents, tokens, round(samples), epochs))
    return found


def table(sources: Sequence[DataSource]) -> str:
    """Returns a table of the data sets, one line each under a line of column names."""
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
    return "\n".join(lines)
