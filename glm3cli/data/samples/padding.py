"""`Padding`: makes samples of different lengths the rows of one micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from glm3cli.data.samples.spec import Sample


@dataclass(frozen=True)
class Padding:
    """How samples of different lengths become the rows of one micro-batch.

    Padding has token 0, segment id 0, and no loss. On the right causal attention doesn't read it;
    on the left the segment ids keep it apart. So the loss is the same on either side, since rotary
    attention depends on distances alone.

    Attributes:
        multiple: The number whose multiples the lengths of micro-batches are, where they follow the
            longest sample; None where all are as long as a sequence can be.
        side: The side that is filled up.
    """

    multiple: int | None = None
    side: Literal["left", "right"] = "right"

    def length(self, sizes: Sequence[int], seq_length: int) -> int:
        """Returns the length of a micro-batch.

        Args:
            sizes: The numbers of positions of its samples.
            seq_length: The largest length of a sequence.
        """
        if self.multiple is None:
            return seq_length
        rounded = -(-max(1, *sizes) // self.multiple) * self.multiple
        return min(rounded, seq_length)

    def rows(self, samples: Sequence[Sample], key: str, length: int) -> np.ndarray:
        """Returns one array of all samples, padded to the length of the micro-batch.

        Args:
            samples: The samples, none longer than `length`.
            key: The key of the array in a sample.
            length: The length of the micro-batch.

        Returns:
            The rows, [b, length].
        """
        arrays = [np.asarray(sample[key]) for sample in samples]
        found = np.zeros((len(samples), length), dtype=arrays[0].dtype)
        for row, values in zip(found, arrays, strict=True):
            start = length - len(values) if self.side == "left" else 0
            row[start : start + len(values)] = values
        return found
