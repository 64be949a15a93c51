"""A device that isn't here: its kernels on meta tensors, which have shapes but no segment_ids.

The real model and the real optimizer run on it, and a dispatch mode sees every operator. It stands
in for the CPU, whose redirects let megatron-core do without CUDA.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from glm3cli.device.base import Device, standing_in
from glm3cli.device.kernels import Kernels
from glm3cli.device.npu import NpuDevice
from glm3cli.device.npu_kernels import NpuKernels
from glm3cli.device.npu_operators import define
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
def planned(kind: type[Device]) -> Iterator[None]:
    """Lets a device of that kind, without segment_ids, be the active one for a while."""
    redirects = Redirects(_TABLE)
    redirects.apply()
    try:
        with standing_in(PlannedDevice(kind)):
            yield
    finally:
        redirects.undo()


class _PlainKernels(Kernels):
    """On meta tensors torch would take attention apart, and make its scores."""

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, segment_ids: Tensor | None
    ) -> Tensor:
        """Through the operator that torch chooses on a CPU; without packs."""
        parts = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
        context, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, 0.0, True, scale=scale
        )
        return context.permute(2, 0, 1, 3)


class _PlannedNpuKernels(NpuKernels):
    """Without a network, what sends while it multiplies is planned as one after the other."""

    gather_matmul = Kernels.gather_matmul
    matmul_scatter = Kernels.matmul_scatter


class PlannedDevice(Device):
    """What a kind of device says of itself, on meta tensors."""

    name: ClassVar[str] = "meta"
    backend: ClassVar[str] = "fake"

    def __init__(self, kind: type[Device]) -> None:
        super().__init__()
        self._kind = kind
        if issubclass(kind, NpuDevice):
            define()
            self.kernels = _PlannedNpuKernels()
        else:
            self.kernels = _PlainKernels()
        # What the planned kind says of itself, read where the model is built.
        self.stream_ordered = kind.stream_ordered  # type: ignore[misc]
        self.fuses_gradient_accumulation = kind.fuses_gradient_accumulation  # type: ignore[misc]
        self.fuses_adamw = kind.fuses_adamw  # type: ignore[misc]

    def _prepare(self) -> None:
        """Nothing: the CPU beneath it is prepared."""

    def torch_device(self) -> torch.device:
        """Where tensors have no segment_ids."""
        return torch.device("meta")

    def synchronize(self) -> None:
        """Nothing runs."""

    def peak_memory(self) -> int:
        """Nothing is allocated."""
        return 0

    def memory(self) -> int:
        """There is no limit to what isn't allocated."""
        return sys.maxsize

    def chip(self) -> str:
        """The kind's name."""
        return self._kind.name
