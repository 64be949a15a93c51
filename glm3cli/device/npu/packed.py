"""Packed samples as npu_fusion_attention takes them: one sequence (TND), and where samples end."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# The limits of a call with packed samples: torch_npu's documents have 1,024 samples in some
# releases and 2 K in others, and 1 M tokens in all of them.
_MOST_SAMPLES, _MOST_TOKENS = 1024, 2**20


def ends_of_samples(segment_ids: Tensor) -> list[int]:
    """Returns where each sample ends among the b * s positions of segment ids [b, s].

    The host waits for it.
    """
    changes = torch.ones_like(segment_ids, dtype=torch.bool)
    changes[:, :-1] = segment_ids[:, 1:] != segment_ids[:, :-1]
    ends: list[int] = (changes.flatten().nonzero().flatten() + 1).tolist()
    return ends


def calls_for(ends: Sequence[int]) -> Iterator[list[int]]:
    """Yields the ends of the samples that one call of attention takes, in their order."""
    part: list[int] = []
    start = 0
    for end in ends:
        if part and (len(part) == _MOST_SAMPLES or end - start > _MOST_TOKENS):
            yield part
            part, start = [], part[-1]
        part.append(end)
    yield part
