"""`Segments`: what the host knows of the segments of a micro-batch."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Segments:
    """The segments of a micro-batch of b whole sequences of S positions.

    Attributes:
        ends: Where each run of equal segment ids ends among the b * S positions, row after row.
        trained: The row and the segment id of each segment that has a trained token, in order.
        last: The largest segment id.
    """

    ends: tuple[int, ...]
    trained: tuple[tuple[int, int], ...]
    last: int

    @classmethod
    def of(cls, segment_ids: np.ndarray, loss_mask: np.ndarray) -> "Segments":
        """Finds them.

        Args:
            segment_ids: The segment id of each position, 0 for padding, [b, S].
            loss_mask: The weight of each position in the loss, [b, S].
        """
        changes = np.ones(segment_ids.shape, dtype=bool)
        changes[:, :-1] = segment_ids[:, 1:] != segment_ids[:, :-1]
        rows, places = np.nonzero((loss_mask > 0) & (segment_ids > 0))
        trained = set(zip(rows.tolist(), segment_ids[rows, places].tolist(), strict=True))
        return cls(
            ends=tuple((np.flatnonzero(changes) + 1).tolist()),
            trained=tuple(sorted(trained)),
            last=int(segment_ids.max(initial=0)),
        )
