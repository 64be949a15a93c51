"""Ascend NPUs: torch_npu, then MindSpeed's adaptor, then megatron; the only place that knows them.

MindSpeed patches megatron-core when it is imported and parses `sys.argv` while doing so: it must
come before every import of megatron, and must not see our arguments.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from glm3cli.device.base import Device
from glm3cli.errors import DeviceError

# Megatron's and HCCL's needs, set unless the user has set them.
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # launch order, on which communication overlap relies
    "HCCL_CONNECT_TIMEOUT": "1200",  # seconds; the 120 s default is short for many machines
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
}
_INSTALL = "source CANN's set_env.sh, install torch_npu 2.7.1 and MindSpeed's branch core_r0.16.0"


@contextmanager
def _hidden_argv() -> Iterator[None]:
    argv = sys.argv
    sys.argv = argv[:1]
    try:
        yield
    finally:
        sys.argv = argv


class NpuDevice(Device):
    """Ascend NPUs with HCCL."""

    name: ClassVar[str] = "npu"
    backend: ClassVar[str] = "hccl"
    environment: ClassVar[Mapping[str, str]] = ENVIRONMENT
    related: ClassVar[tuple[str, ...]] = ("HCCL_", "ASCEND_", "PYTORCH_NPU_", "RANK_TABLE_FILE")
    _npu: Any  # torch_npu's counterpart of torch.cuda

    def _prepare(self) -> None:
        with _hidden_argv():
            torch_npu = self._import("torch_npu")
            self._import("torch_npu.contrib.transfer_to_npu")
            self._import("mindspeed.megatron_adaptor")
        if not torch_npu.npu.is_available():
            raise DeviceError("--device npu: torch_npu finds no NPU", "see `npu-smi info`")
        torch_npu.npu.set_device(self.torch_device())
        self._npu = torch_npu.npu

    def _import(self, name: str) -> Any:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise DeviceError(f"--device npu: import {name} failed: {error}", _INSTALL) from error

    def synchronize(self) -> None:
        """Waits for the NPU."""
        self._npu.synchronize()

    def peak_memory(self) -> int:
        """Peak bytes of torch_npu's allocator."""
        return int(self._npu.max_memory_allocated())

    def chip(self) -> str:
        """The NPU's name, e.g. Ascend910B3."""
        return str(self._npu.get_device_name())

    def profiler(self) -> Any:
        """torch_npu's own profiler: torch's doesn't see the NPU."""
        profiler = self._import("torch_npu.profiler")
        activities = profiler.ProfilerActivity
        return profiler.profile(activities=[activities.CPU, activities.NPU])
