"""Divides the documents of a data set into training, validation and test documents."""

import numpy as np

from glm3cli.errors import DataError


def document_ranges(
    num_documents: int, split: str, prefix: str, *, needs_valid: bool
) -> tuple[range, range]:
    """Returns the numbers of the training documents and of the validation documents.

    The bounds are rounded as in megatron-core (source: its blended_megatron_dataset_builder.py).

    Args:
        num_documents: The number of documents in the data set.
        split: The proportions of training, validation and test documents, such as "949,50,1".
        prefix: The prefix of the data set, for the error message.
        needs_valid: Whether there must be a validation document.

    Raises:
        DataError: There is no training document, or no validation document though one is needed.
    """
    shares = np.cumsum([0.0, *(float(share) for share in split.split(","))])
    edges = [round(share / shares[-1] * num_documents) for share in shares.tolist()]
    train, valid = range(edges[0], edges[1]), range(edges[1], edges[2])
    for name, documents, needed in (("training", train, True), ("validation", valid, needs_valid)):
        if needed and not documents:
            raise DataError(
                f"--data {prefix}: --split {split} of {num_documents} document(s) leaves "
                f"none for {name}",
                "give that part a larger share in --split"
                + (", or drop --eval-interval" if name == "validation" else ""),
            )
    return train, valid
