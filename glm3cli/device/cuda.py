"""CUDA, which megatron-core assumes: nothing to redirect."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from glm3cli.device.base import Device
from glm3cli.errors import DeviceError


class CudaDevice(Device):
    """NVIDIA GPUs with NCCL."""

    name: ClassVar[str] = "cuda"
    backend: ClassVar[str] = "nccl"
    fuses_adamw: ClassVar[bool] = True
    # Megatron's overlap of communication relies on the order of kernel launches.
    environment: ClassVar[Mapping[str, str]] = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    related: ClassVar[tuple[str, ...]] = ("NCCL_", "CUDA_", "PYTORCH_CUDA_")

    def _prepare(self) -> None:
        if not torch.cuda.is_available():
            raise DeviceError("--device cuda: torch finds no GPU", "use --device cpu")
        torch.cuda.set_device(self.torch_device())

    def synchronize(self) -> None:
        """Waits for the GPU."""
        torch.cuda.synchronize()

    def peak_memory(self) -> int:
        """Peak bytes of torch's allocator."""
        return torch.cuda.max_memory_allocated()

    def memory(self) -> int:
        """Of the GPU."""
        return int(torch.cuda.get_device_properties(self.torch_device()).total_memory)

    def chip(self) -> str:
        """The GPU's name."""
        return torch.cuda.get_device_name()
