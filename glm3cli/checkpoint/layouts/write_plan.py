"""The arguments of every writer: what to write, where its tensors come from, and whom to tell.

`WritePlan` holds the model, its parallel sizes, and the types; a `Produce` function returns the
tensors; a `Final` function is called as the files grow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glm3cli.checkpoint.names import Slot, Weight
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ModelParallelConfig

# Returns the canonical tensor of a weight and a layer. A writer must call it once for each, in the
# order of `slots`.
Produce = Callable[[Weight, int | None], Tensor]
# Called again and again with a file and a place in it: the bytes before have their final values.
Final = Callable[[Path, int], None]


@dataclass(frozen=True)
class WritePlan:
    """What is to be written.

    Attributes:
        model: The model's shape; its type is that of most weights.
        parallel: The parallel sizes that per-rank files are cut for.
        dtypes: The type of every weight.
        shard_bytes: The largest number of bytes of tensors in one file of a Hugging Face folder.
    """

    model: ModelConfig
    parallel: ModelParallelConfig
    dtypes: Mapping[Slot, torch.dtype]
    shard_bytes: int

    def num_bytes(self, slot: Slot) -> int:
        """Returns the size of one whole weight, in bytes."""
        return torch.Size(slot[0].shape(self.model)).numel() * self.dtypes[slot].itemsize

    @property
    def total_bytes(self) -> int:
        """The size of all weights, in bytes."""
        return sum(self.num_bytes(slot) for slot in self.dtypes)

    @property
    def main_dtype(self) -> torch.dtype:
        """The type that most weights have."""
        return max(self.dtypes.values(), key=list(self.dtypes.values()).count)
