"""NVIDIA GPUs as a device. Megatron-core assumes CUDA, so nothing is redirected."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from glm3cli.device.base import Device, Graphs, upload_pinned
from glm3cli.device.catalog import Chip, chip_of_driver
from glm3cli.errors import DeviceError


class CudaDevice(Device):
    """NVIDIA GPUs with NCCL as collective backend."""

    name: ClassVar[str] = "cuda"
    backend: ClassVar[str] = "nccl"
    fuses_adamw: bool = True
    captures_steps: bool = True
    # Megatron's overlap of communication relies on the order of kernel launches.
    environment: ClassVar[Mapping[str, str]] = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    related: ClassVar[tuple[str, ...]] = ("NCCL_", "CUDA_", "PYTORCH_CUDA_")

    @classmethod
    def described(cls, num_local_ranks: int) -> Chip:
        """Returns what chips.toml says about GPUs of this name, with the memory that they have.

        Args:
            num_local_ranks: Number of ranks on this machine, each of which has a GPU.

        Raises:
            DeviceError: torch finds no GPU, or chips.toml doesn't describe it.
        """
        if not torch.cuda.is_available():
            return super().described(num_local_ranks)
        about = torch.cuda.get_device_properties(0)
        chip = chip_of_driver(about.name)
        if chip is None:
            return super().described(num_local_ranks)
        return replace(chip, memory_gib=about.total_memory / 2**30)

    def _prepare(self) -> None:
        """Picks this rank's GPU.

        Raises:
            DeviceError: torch finds no GPU.
        """
        if not torch.cuda.is_available():
            raise DeviceError("--device cuda: torch finds no GPU", "use --device cpu")
        torch.cuda.set_device(self.torch_device())
        # Advice about libraries that glm3 does without, and about devices, which are chosen above.
        warnings.filterwarnings("ignore", module=r"megatron\.")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        warnings.filterwarnings("ignore", r"barrier\(\): using the device", UserWarning)

    def new_graphs(self) -> Graphs:
        """Returns an empty collection of CUDA graphs."""
        return Graphs(torch.cuda, torch.cuda.CUDAGraph, self.torch_device())

    def upload(self, numbers: Sequence[Sequence[int]], target: torch.Tensor) -> None:
        """Copies from pinned memory, for which the host doesn't wait."""
        upload_pinned(numbers, target)

    def synchronize(self) -> None:
        """Waits until the GPU has done all work that is queued on it."""
        torch.cuda.synchronize()

    def peak_memory(self) -> int:
        """Returns the peak of what torch's allocator has handed out, in bytes."""
        return torch.cuda.max_memory_allocated()

    def memory(self) -> int:
        """Returns the memory of this rank's GPU, in bytes."""
        return int(torch.cuda.get_device_properties(self.torch_device()).total_memory)

    def chip(self) -> str:
        """Returns the GPU's name, such as NVIDIA A100-SXM4-80GB."""
        return torch.cuda.get_device_name()
