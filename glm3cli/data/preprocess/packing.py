"""Packs samples into sequences of a given length: best-fit decreasing.

The longest sample comes first, and each goes where it leaves least room (source: D. S. Johnson,
"Near-optimal bin packing algorithms", 1973; never more than 11/9 of the fewest packs, and 1). In a
packed sequence `attention_mask` counts the samples from 1, which tells where each begins.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from glm3cli.data.indexed import IndexedWriter

# Tokens that are brought together at a time.
_BATCH_TOKENS = 1 << 22


def best_fit_decreasing(lengths: np.ndarray, room: int) -> list[list[int]]:
    """The samples of every pack.

    Args:
        lengths: Tokens of each sample; none has more than `room`.
        room: Tokens of a pack.

    Returns:
        Indices of samples, in their old order within a pack; packs in the order of their first
        samples.
    """
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set if some pack has room for r more tokens
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        fitting = rooms >> length
        if fitting and length:
            left = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[left].pop()
            if not with_room[left]:
                rooms &= ~(1 << left)
        else:
            left, pack = room, len(packs)
            packs.append([])
        packs[pack].append(sample)
        with_room.setdefault(left - length, []).append(pack)
        rooms |= 1 << (left - length)
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0])


def pack_files(
    folder: Path, samples: Mapping[str, Path], room: int, names: Mapping[str, str]
) -> Iterator[float]:
    """Writes packed files into `folder`; yields the share that is done.

    Args:
        folder: Where to.
        samples: The .bin files of `input_ids` and `labels`, a sequence per sample.
        room: Tokens of a pack.
        names: The new files' names, of `attention_mask` too.
    """
    lengths = np.fromfile(samples["input_ids"].with_suffix(".lengths"), np.int32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    packs = best_fit_decreasing(lengths, room)
    files = {
        key: np.memmap(samples[key], np.int32, "r") if lengths.any() else np.empty(0, np.int32)
        for key in ("input_ids", "labels")
    }
    writers = {key: IndexedWriter(folder / name) for key, name in names.items()}
    done = 0
    for batch in _batches(packs, lengths):
        order = np.concatenate([np.array(pack) for pack in batch])
        sizes = np.array([lengths[pack].sum() for pack in batch], dtype=np.int32)
        ones = np.ones(len(batch), dtype=np.int64)
        for key, file in files.items():
            tokens = np.concatenate([file[starts[i] : starts[i] + lengths[i]] for i in order])
            writers[key].add(tokens, sizes, ones)
        numbers = np.concatenate([np.arange(1, len(pack) + 1, dtype=np.int32) for pack in batch])
        writers["attention_mask"].add(np.repeat(numbers, lengths[order]), sizes, ones)
        done += len(order)
        yield done / len(lengths)
    for writer in writers.values():
        writer.finish()


def _batches(packs: Sequence[list[int]], lengths: np.ndarray) -> Iterator[list[list[int]]]:
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
