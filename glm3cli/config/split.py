"""`Split`: the type of `--split`, the proportions of training, validation and test documents."""

import re
from typing import Annotated

from pydantic import AfterValidator

_PROPORTION = r"\d{1,9}(\.\d{1,9})?"


def _check(split: str) -> str:
    """Returns the proportions; raises ValueError unless they are three, the first above 0."""
    parts = split.split(",")
    if not all(re.fullmatch(_PROPORTION, part) for part in parts) or len(parts) > 3:
        raise ValueError("give three proportions, such as 949,50,1")
    if len(parts) < 3:
        whole = ",".join([*parts, "0", "0"][:3])
        raise ValueError(
            f"give three proportions, of training, validation and test documents: {whole} has none "
            "for the rest"
        )
    if not float(parts[0]):
        raise ValueError("the first proportion, of training documents, must be above 0")
    return split


Split = Annotated[str, AfterValidator(_check)]
