"""`Document`: the token ids that a handler makes of one row."""

from dataclasses import dataclass, field

import numpy as np

Ids = list[int] | np.ndarray


@dataclass
class Document:
    """The token ids of one row.

    Attributes:
        sequences: The sequences of token ids by output key; a key that is missing gets no
            document.
        text_bytes: The size of the encoded text, in bytes of UTF-8.
        num_dropped: The number of samples that were left out because --seq-length left no answer,
            or because their weight is 0.
        num_truncated: The number of samples that --seq-length cut.
        num_equal: The number of pairs that were left out because their answers are the same.
    """

    sequences: dict[str, list[Ids]] = field(default_factory=dict)
    text_bytes: int = 0
    num_dropped: int = 0
    num_truncated: int = 0
    num_equal: int = 0


def utf8_size(text: str) -> int:
    """Returns the size of a text in bytes of UTF-8; half a surrogate pair counts as one byte."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
