"""Distributes samples over packs: sequences of a given length that hold several samples each.

Samples are packed by best-fit decreasing: they are taken from the longest to the shortest, and each
goes into the pack in which it leaves the least room (source: D. S. Johnson, "Near-optimal bin
packing algorithms", 1973: at most 11/9 of the smallest possible number of packs, plus 1).
`glm3 preprocess --pack` and `glm3 finetune --packing` both use it.
"""

import numpy as np


def sample_sizes(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """Returns the numbers of positions of samples: those that predict a token of the same sample.

    Args:
        lengths: The number of tokens of each sample.
        seq_length: The number of positions to which a training cuts a sample.

    Returns:
        int64, in the shape of `lengths`.
    """
    return np.clip(lengths.astype(np.int64) - 1, 0, seq_length)


def best_fit_decreasing(lengths: np.ndarray, pack_length: int) -> list[list[int]]:
    """Distributes samples over packs by best-fit decreasing.

    Args:
        lengths: The number of tokens of each sample, at most `pack_length`.
        pack_length: The largest number of tokens of a pack.

    Returns:
        The indices of the samples of every pack, in increasing order; the packs are in the order of
        their first samples.
    """
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # the packs by the number of tokens that still fit
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
            left, pack = pack_length, len(packs)
            packs.append([])
        packs[pack].append(sample)
        with_room.setdefault(left - length, []).append(pack)
        rooms |= 1 << (left - length)
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0])
