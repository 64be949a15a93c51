"""RMSNorm for megatron-core's layer spec."""

from typing import Any

import torch
from torch import Tensor

from glm3cli.device import require_active


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dim, computed in fp32 as in the original code.

    Megatron-core's own torch norm refuses sequence parallelism; all that takes is the mark on the
    weight, by which the gradient is summed over the tensor parallel ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h]."""
        return require_active().kernels.rms_norm(hidden, self.weight, self.eps)
