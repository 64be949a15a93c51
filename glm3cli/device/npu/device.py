"""Ascend NPUs as a device: imports torch_npu, then MindSpeed's adaptor, and only then megatron.

This is the only module that imports these packages. torch_npu's transfer_to_npu makes
megatron-core's `cuda` mean an NPU. MindSpeed, which repairs what is left, patches megatron-core
when it is imported and parses `sys.argv` while doing so: it must come before every import of
megatron, and must see its own arguments instead of ours.
"""

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from glm3cli.device.base import Device, Graphs, upload_pinned
from glm3cli.device.catalog import Chip, find_chip
from glm3cli.device.doctor.cards import require_cards
from glm3cli.device.doctor.environment import ENVIRONMENT
from glm3cli.device.doctor.machine import Machine
from glm3cli.device.doctor.mindspeed import LOST, has_mindspeed
from glm3cli.device.doctor.versions import require_versions
from glm3cli.device.kernels import Kernels, SavedForBackward
from glm3cli.device.npu.kernels import NpuKernels
from glm3cli.device.npu.redirects import REDIRECTS
from glm3cli.device.redirects import Redirect, Redirects, compile_nothing
from glm3cli.errors import DeviceError
from glm3cli.host.environment import number_of

# The variables that MindSpeed's npu_deterministic sets.
_DETERMINISTIC = {"HCCL_DETERMINISTIC": "true", "CLOSE_MATMUL_K_SHIFT": "1"}
# What MindSpeed is to do: only what megatron-core needs to run on NPUs, and its AdamW. Its fused
# operators and its parallelism are for the models of megatron.training; ours has its own.
MINDSPEED_ARGUMENTS = ("--optimization-level", "0", "--optimizer-selection", "fused_adamw")
# The same with torch's AdamW, for --without-kernel adamw.
WITHOUT_ADAMW = (*MINDSPEED_ARGUMENTS[:-1], "fused_torch_adamw")
_INSTALL = "`glm3 doctor` says what is missing"


def _cuda_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces Tensor.type by one that names CUDA's types for tensors on an NPU."""

    @functools.wraps(original)
    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.npu.", "torch.cuda.", 1)

    return type_of


def _set_rng_state(_original: Any) -> Callable[..., None]:
    """Replaces the setter of CUDA's generator by torch_npu's."""
    return lambda state, *_args, **_kwargs: torch.npu.set_rng_state(state)  # type: ignore[attr-defined]


# What MindSpeed's adaptor would do, where it isn't installed.
_WITHOUT_MINDSPEED = (
    Redirect("torch", "compile", compile_nothing, "jit.py: torch.compile as fuser is for CUDA"),
    Redirect("torch.Tensor", "type", _cuda_type, "optimizer/optimizer.py: 'torch.cuda.' types"),
    Redirect(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _set_rng_state,
        "tensor_parallel/random.py: CUDA's own generators",
    ),
)


@contextmanager
def _mindspeed_argv(arguments: Sequence[str]) -> Iterator[None]:
    """Within the block `sys.argv` holds MindSpeed's arguments instead of ours."""
    argv = sys.argv
    sys.argv = [argv[0], *arguments]
    try:
        yield
    finally:
        sys.argv = argv


def _keep_stdout_for_results() -> None:
    """Sends to stderr what root loggers write to stdout, where MindSpeed points them."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)


class NpuDevice(Device):
    """Ascend NPUs with HCCL as collective backend.

    Attributes:
        machine: The machine whose NPUs and versions are checked before anything is imported.
    """

    name: ClassVar[str] = "npu"
    backend: ClassVar[str] = "hccl"
    # HCCL's batched messages are in the order of the streams that wait for them.
    synchronizes_messages: ClassVar[bool] = False
    kernels_class: ClassVar[type[Kernels]] = NpuKernels
    fuses_adamw: bool = True
    captures_steps: bool = True
    saved_for_backward: SavedForBackward = NpuKernels.saved_for_backward
    environment: ClassVar[Mapping[str, str]] = ENVIRONMENT
    related: ClassVar[tuple[str, ...]] = ("HCCL_", "ASCEND_", "PYTORCH_NPU_", "RANK_TABLE_FILE")
    _npu: Any  # torch_npu's counterpart of torch.cuda

    def __init__(self, machine: Machine | None = None) -> None:
        super().__init__()
        self.machine = machine or Machine()

    @classmethod
    def described(cls, num_local_ranks: int) -> Chip:
        """Returns the first device of chips.toml: only torch_npu could tell an NPU's name."""
        return find_chip(None)

    def _prepare(self) -> None:
        """Imports the vendor's packages in their order, and picks this rank's NPU.

        Raises:
            DeviceError: NPUs or versions don't fit, an import fails, or there is no NPU.
        """
        require_cards(self.machine)
        require_versions(self.machine)
        with _mindspeed_argv(MINDSPEED_ARGUMENTS if self.fuses_adamw else WITHOUT_ADAMW):
            self._npu = self._import("torch_npu").npu
            if not self._npu.is_available():
                raise DeviceError("--device npu: torch_npu finds no NPU", "see `npu-smi info`")
            # Before all else: whatever touches the NPU earlier, as an import of MindSpeed may,
            # opens the first one for all ranks.
            self._npu.set_device(self.torch_device())
            self._import("torch_npu.contrib.transfer_to_npu")
            if has_mindspeed(self.machine):
                self._import("mindspeed.megatron_adaptor")
                _keep_stdout_for_results()
            else:
                self.remarks = (LOST,)
                Redirects(_WITHOUT_MINDSPEED).apply()
        Redirects(REDIRECTS).apply()
        # Compiled operators (aclnn) instead of a compilation for every new shape.
        self._npu.set_compile_mode(jit_compile=False)

    def _import(self, name: str) -> Any:
        """Imports a package of the vendor's.

        Raises:
            DeviceError: The import fails, for whatever reason.
        """
        try:
            return importlib.import_module(name)
        except Exception as error:  # torch_npu raises bare ones where a part of CANN is missing
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DeviceError(f"--device npu: import {name} failed: {reason}", _INSTALL) from error

    def make_deterministic(self) -> None:
        """Fixes HCCL's reductions and the order of sums in matrix products as well as torch's."""
        super().make_deterministic()
        os.environ.update(_DETERMINISTIC)

    def new_graphs(self) -> Graphs:
        """Returns an empty collection of NPU graphs, which CANN calls aclgraphs."""
        return Graphs(self._npu, self._npu.NPUGraph, self.torch_device())

    def upload(self, numbers: Sequence[Sequence[int]], target: torch.Tensor) -> None:
        """Copies from pinned memory, for which the host doesn't wait."""
        upload_pinned(numbers, target)

    def synchronize(self) -> None:
        """Waits until the NPU has done all work that is queued on it."""
        self._npu.synchronize()

    def peak_memory(self) -> int:
        """Returns the peak of what torch_npu's allocator has handed out, in bytes."""
        return int(self._npu.max_memory_allocated())

    def memory(self) -> int:
        """Returns the memory of this rank's NPU that this process may fill, in bytes.

        It is what the driver, some 3 GB, and other processes have left, and what this one holds.
        """
        device = self.torch_device()
        free, _ = self._npu.mem_get_info(device)
        return int(free + self._npu.memory_reserved(device))

    def memory_of_groups(self, count: int) -> int:
        """Returns the bytes of HCCL's buffers: of each group one to send and one to receive.

        HCCL_BUFFSIZE is the size of one in MB; 200 is HCCL's default.
        """
        return count * 2 * number_of("HCCL_BUFFSIZE", 200) * 2**20

    def chip(self) -> str:
        """Returns the NPU's name, such as Ascend910B3."""
        return str(self._npu.get_device_name())

    def profiler(self) -> Any:
        """Returns torch_npu's own profiler, since torch's doesn't see the NPU."""
        profiler = self._import("torch_npu.profiler")
        activities = profiler.ProfilerActivity
        return profiler.profile(activities=[activities.CPU, activities.NPU])
