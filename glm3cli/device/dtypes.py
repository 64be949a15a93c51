"""The one table of torch's types for the names of types that a user writes (`--dtype bf16`)."""

from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Quantized:
    """A weight of whole numbers, [out, in].

    Attributes:
        bits: 8, or 4.
        numbers: The numbers: -127 to 127 or 0 to 15.
        scales: The scale of each output, [out], or of each group of its inputs, [out, groups].
        zeros: With 4 bits, what the number 8 stands for, [out, groups]; else None.
    """

    bits: int
    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def weight(self) -> Tensor:
        """Returns the weight that the numbers stand for, in fp32."""
        if self.zeros is None:
            return self.numbers * self.scales.unsqueeze(1)
        parts = self.numbers.view(*self.scales.shape, -1) - 8
        return (parts * self.scales.unsqueeze(-1) + self.zeros.unsqueeze(-1)).flatten(1)
