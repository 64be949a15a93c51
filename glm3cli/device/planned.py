"""A device that isn't here, on meta tensors, which have shapes but no data.

The real model and the real optimizer run on it with the kernels of the planned kind of device,
while forecast/ records every operator. It stands in for the active CPU, whose redirects let
megatron-core do without CUDA.
"""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from glm3cli.device.base import Device, standing_in
from glm3cli.device.choice import without
from glm3cli.device.cpu import CpuDevice
from glm3cli.device.cpu_kernels import CpuKernels
from glm3cli.device.kernels import Kernels
from glm3cli.device.npu.device import NpuDevice
from glm3cli.device.npu.kernels import NpuKernels
from glm3cli.device.npu.operators import define
from glm3cli.device.redirects import Redirect, Redirects

_TABLE = (
    Redirect(
        "torch.optim.adam",
        "_device_dtype_check_for_fused",
        lambda _: lambda *_args, **_kwargs: None,
        "torch's fused AdamW, which refuses meta tensors",
    ),
)


@contextmanager
def planned(kind: type[Device], without_kernels: Collection[str] = ()) -> Iterator[None]:
    """Within the block a device of the given kind, with meta tensors, is the active one.

    Args:
        kind: The kind of device.
        without_kernels: The operations that are computed in plain torch.

    Raises:
        DeviceError: No device is active: the CPU must be.
    """
    redirects = Redirects(_TABLE)
    redirects.apply()
    try:
        device = PlannedDevice(kind)
        device.leave_out(without_kernels)
        with standing_in(device):
            yield
    finally:
        redirects.undo()


class _PlainKernels(Kernels):
    """The kernels in plain torch, with attention as one operator on meta tensors, too.

    There, torch would otherwise compute attention in several operations that make its scores.
    """

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, segment_ids: Tensor | None
    ) -> Tensor:
        """Calls the operator that torch chooses on a CPU; `segment_ids` are ignored."""
        parts = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
        context, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, 0.0, True, scale=scale
        )
        return context.permute(2, 0, 1, 3)


class _PlannedCpuKernels(_PlainKernels, CpuKernels):
    """A CPU's kernels, but for attention."""


class _PlannedNpuKernels(NpuKernels):
    """Ascend's kernels, but with communication and products of `--mc2` one after the other.

    The fused operators of `--mc2` need a real network to be called.
    """

    gather_matmul = Kernels.gather_matmul
    matmul_scatter = Kernels.matmul_scatter


class PlannedDevice(Device):
    """A device of some kind that has no chip: its tensors are meta tensors.

    Args:
        kind: The kind of device whose kernels and abilities it has.
    """

    name: ClassVar[str] = "meta"
    backend: ClassVar[str] = "fake"

    def __init__(self, kind: type[Device]) -> None:
        self._kind = kind
        if issubclass(kind, NpuDevice):
            define()
        super().__init__()
        # The abilities of the planned kind decide how the model is built.
        self.stream_ordered = kind.stream_ordered  # type: ignore[misc]
        self.fuses_gradient_accumulation = kind.fuses_gradient_accumulation  # type: ignore[misc]

    def leave_out(self, names: Collection[str]) -> None:
        """Uses plain torch for the named operations, and the planned kind's kernels for others."""
        self.without_kernels = tuple(dict.fromkeys(names))
        self.kernels = without(self._whole_kernels(), names)
        self.fuses_adamw = self._kind.fuses_adamw and "adamw" not in names

    def _whole_kernels(self) -> Kernels:
        """Returns the planned kind's kernels, for meta tensors."""
        if issubclass(self._kind, NpuDevice):
            return _PlannedNpuKernels()
        return _PlannedCpuKernels() if issubclass(self._kind, CpuDevice) else _PlainKernels()

    def _prepare(self) -> None:
        """Does nothing, since the CPU that it stands in for is prepared."""

    def torch_device(self) -> torch.device:
        """Returns torch's meta device, whose tensors have no data."""
        return torch.device("meta")

    def synchronize(self) -> None:
        """Returns at once, since nothing is computed."""

    def peak_memory(self) -> int:
        """Returns 0, since nothing is allocated."""
        return 0

    def memory(self) -> int:
        """Returns the largest integer: nothing is allocated, so there is no limit."""
        return sys.maxsize

    def chip(self) -> str:
        """Returns the name of the planned kind of device, such as npu."""
        return self._kind.name
