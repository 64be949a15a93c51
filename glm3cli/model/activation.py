"""ChatGLM3's activation: SwiGLU, between the two linear layers of megatron-core's MLP."""

from typing import Any

from torch import Tensor

from glm3cli.device import require_active


class SwiGLU:
    """The activation of megatron-core's MLP; its own torch path makes four tensors more."""

    def __init__(self, config: Any) -> None:
        pass

    def __call__(self, gate_and_up: Tensor) -> Tensor:
        """[s, b, 2 ffn] -> [s, b, ffn]."""
        return require_active().kernels.swiglu(gate_and_up)
