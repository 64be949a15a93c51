"""RMSNorm and SwiGLU as modules of megatron-core's layer spec, on the device's kernels."""

from typing import Any

import torch
from torch import Tensor

from glm3cli.device import require_active


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 as in the original code.

    Megatron-core's own torch norm refuses sequence parallelism. All that sequence parallelism needs
    is the mark on the weight, for which its gradient is summed over the tensor parallel ranks.

    Attributes:
        eps: Number that is added to the mean square.
        weight: The scale of each number, [h].
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises hidden states, [s, b, h] -> [s, b, h]."""
        return require_active().kernels.rms_norm(hidden, self.weight, self.eps)


class SwiGLU:
    """The activation between the two linear layers of megatron-core's MLP.

    It has no weights. It takes the place of megatron-core's own torch code, which would make four
    tensors more.
    """

    def __init__(self, config: Any) -> None:
        pass

    def __call__(self, gate_and_up: Tensor) -> Tensor:
        """Returns silu(gate) * up, [s, b, 2 ffn] -> [s, b, ffn]."""
        return require_active().kernels.swiglu(gate_and_up)
