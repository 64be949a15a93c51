"""Writes packed files: sequences of a given length that hold several samples each.

The key `attention_mask` of a packed sequence holds segment ids: the number, from 1, of the sample
that each token belongs to.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from glm3cli.data.indexed import IndexedWriter
from glm3cli.data.kinds import WEIGHTS_KEY
from glm3cli.data.packs import best_fit_decreasing

# How many tokens are copied at a time.
_BATCH_TOKENS = 1 << 22


def pack_files(
    folder: Path,
    samples: Mapping[str, Path],
    pack_length: int,
    names: Mapping[str, str],
    stride: int = 1,
) -> Iterator[float]:
    """Writes packed files and yields the share of the samples that are packed, 0 to 1.

    Args:
        folder: The folder that the files are written into.
        samples: The .bin files by output key, as in `names`, which have one sequence for each
            sample, with their .lengths files beside them.
        pack_length: The largest number of tokens of a pack.
        names: The names of the packed files without endings, by output key: `input_ids`, `labels`
            and `attention_mask`, and `weights` if the samples have some.
        stride: What is added to the segment ids of a sample for each sample before it in the pack.
    """
    lengths = np.fromfile(samples["input_ids"].with_suffix(".lengths"), np.int32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    packs = best_fit_decreasing(lengths, pack_length)
    files = {
        key: np.memmap(samples[key], np.int32, "r") if lengths.any() else np.empty(0, np.int32)
        for key in names
    }
    writers = {key: IndexedWriter(folder / name) for key, name in names.items()}
    done = 0
    for batch in _batches(packs, lengths):
        order = np.concatenate([np.array(pack) for pack in batch])
        sizes = np.array([lengths[pack].sum() for pack in batch], dtype=np.int32)
        ones = np.ones(len(batch), dtype=np.int64)
        for key, file in files.items():
            if key == WEIGHTS_KEY:  # a number for each sample
                counts = np.array([len(pack) for pack in batch], dtype=np.int32)
                writers[key].add(file[order], counts, ones)
                continue
            tokens = np.concatenate([file[starts[i] : starts[i] + lengths[i]] for i in order])
            if key == "attention_mask":
                before = np.concatenate([np.arange(len(pack), dtype=np.int32) for pack in batch])
                tokens = tokens + stride * np.repeat(before, lengths[order])
            writers[key].add(tokens, sizes, ones)
        done += len(order)
        yield done / len(lengths)
    for writer in writers.values():
        writer.finish()


def _batches(packs: Sequence[list[int]], lengths: np.ndarray) -> Iterator[list[list[int]]]:
    """Groups packs so that each group has about `_BATCH_TOKENS` tokens."""
    batch: list[list[int]] = []
    size = 0
    for pack in packs:
        batch.append(pack)
        size += int(lengths[pack].sum())
        if size >= _BATCH_TOKENS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
