"""What a blend gives: documents, tokens, samples and epochs of each source, without megatron."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm3cli.data.indexed import read_lengths
from glm3cli.data.kinds import DataKind
from glm3cli.data.prefixes import Blend
from glm3cli.data.samples.splits import document_ranges


@dataclass(frozen=True)
class DataSource:
    """One part of a blend.

    Attributes:
        weight: Its share of the samples, 0 to 1.
        documents: In its training split.
        tokens: In its training split.
        samples: That training takes from it, about.
        epochs: How often training goes through it.
    """

    prefix: str
    weight: float
    documents: int
    tokens: int
    samples: int
    epochs: float


def data_sources(
    blend: Blend, kind: DataKind, split: str, seq_length: int, num_samples: int
) -> list[DataSource]:
    """Every part of a blend, for a training of `num_samples` samples.

    Raises:
        DataError: An index is damaged, or a split has no document.
    """
    parts = []
    for prefix in blend.prefixes:
        lengths = read_lengths(kind.main_file(prefix), prefix)
        train, _ = document_ranges(len(lengths), split, prefix, needs_valid=False)
        part = lengths[train.start : train.stop]
        parts.append((prefix, len(part), int(part.sum(dtype=np.int64))))
    sizes = [kind.default_weight(documents, tokens) for _, documents, tokens in parts]
    weights = np.array(blend.weights or sizes, dtype=np.float64)
    shares = (weights / weights.sum()).tolist()
    found = []
    for (prefix, documents, tokens), share in zip(parts, shares, strict=True):
        samples = share * num_samples
        epochs = kind.epochs(samples, seq_length, documents, tokens)
        found.append(DataSource(prefix, share, documents, tokens, round(samples), epochs))
    return found


def table(sources: Sequence[DataSource]) -> str:
    """The sources as lines of text."""
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
