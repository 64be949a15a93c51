"""Which documents are for training, and which for validation."""

import numpy as np

from glm3cli.errors import DataError


def document_ranges(
    num_documents: int, split: str, prefix: str, *, needs_valid: bool
) -> tuple[range, range]:
    """Documents of the training and validation splits (megatron-core's rounding).

    Args:
        num_documents: In the file.
        split: Proportions of training, validation, and test documents, "949,50,1".
        prefix: The file, for messages.
        needs_valid: Whether there has to be one for validation.

    Raises:
        DataError: A split has no document.
    """
    shares = np.cumsum([0.0, *(float(part) for part in split.split(","))])
    edges = [round(share / shares[-1] * num_documents) for share in shares.tolist()]
    train, valid = range(edges[0], edges[1]), range(edges[1], edges[2])
    for name, part, needed in (("training", train, True), ("validation", valid, needs_valid)):
        if needed and not part:
            raise DataError(
                f"--data {prefix}: --split {split} of {num_documents} document(s) leaves "
                f"none for {name}",
                "give that part a larger share in --split"
                + (", or drop --eval-interval" if name == "validation" else ""),
            )
    return train, valid
