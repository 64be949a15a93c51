"""What every writer is given: the model, how to cut it, and a function that makes its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glm3cli.checkpoint.names import Slot, Weight
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ModelParallelConfig

# Gives the canonical tensor of one row of the table; to be asked for all in the order of `slots`.
Produce = Callable[[Weight, int | None], Tensor]
# Told of a file again and again: its bytes before this one have their final values.
Final = Callable[[Path, int], None]


@dataclass(frozen=True)
class WritePlan:
    """What is to be written.

    Attributes:
        dtypes: The type of every tensor.
        shard_bytes: Most bytes of tensors in one file of a Hugging Face folder.
    """

    model: ModelConfig
    parallel: ModelParallelConfig
    dtypes: Mapping[Slot, torch.dtype]
    shard_bytes: int

    def num_bytes(self, slot: Slot) -> int:
        """Bytes of one whole tensor."""
        return torch.Size(slot[0].shape(self.model)).numel() * self.dtypes[slot].itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.num_bytes(slot) for slot in self.dtypes)

    @property
    def main_dtype(self) -> torch.dtype:
        """The type of most weights."""
        return max(self.dtypes.values(), key=list(self.dtypes.values()).count)
