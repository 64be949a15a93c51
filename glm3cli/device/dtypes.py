"""The one table of torch's types for the names of types that a user writes (`--dtype bf16`)."""

import torch

from glm3cli.config.model import DType

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def dtype_name(dtype: torch.dtype) -> DType:
    """Returns the name of a torch type, the inverse of `TORCH_DTYPES`.

    Raises:
        KeyError: The type isn't one of the three in which weights are kept.
    """
    return _NAMES[dtype]


_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
