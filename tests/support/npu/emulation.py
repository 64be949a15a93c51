"""The emulated NPU of a child process: our NPU path on the real torch_npu, with CPU kernels."""

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock, patch

import torch

from glm3cli import device
from glm3cli.device.base import Device
from glm3cli.device.cpu import REDIRECTS
from glm3cli.device.npu.device import NpuDevice
from glm3cli.device.npu.kernels import NpuKernels
from glm3cli.device.redirects import Redirects
from tests.support.machines import install, server
from tests.support.npu import graphs
from tests.support.npu.card import ON_CARD, Card, follow
from tests.support.npu.operators import KERNELS, with_defaults


class EmulatedKernels(NpuKernels):
    """`NpuKernels` as they are, except that groups have made-up names for HCCL."""

    def hccl_name(self, group: Any) -> str:
        return str(group.group_name)


class EmulatedNpu(NpuDevice):
    """`NpuDevice` as it is, except that tensors are on the CPU and gloo is the network."""

    backend: ClassVar[str] = "gloo"
    kernels_class = EmulatedKernels
    stream_ordered: ClassVar[bool] = False
    card = Card()
    upload = Device.upload  # a build of torch for CPUs pins no memory

    def _import(self, name: str) -> Any:
        with _triton() if name.startswith("mindspeed") else nullcontext():
            module = super()._import(name)
        if name == "torch_npu":
            _give_it_a_card(module.npu)
            graphs.give(module.npu, self.card)
        return module

    def _prepare(self) -> None:
        super()._prepare()
        warnings.filterwarnings("ignore", module=r"megatron\.")
        library = torch.library.Library("npu", "IMPL")
        for name, function in KERNELS.items():
            library.impl(name, with_defaults(name, function), "CPU")
        self._library = library  # the kernels live as long as it
        if "type" in vars(torch.nn.Parameter):  # MindSpeed's, which would hide Tensor.type below
            del torch.nn.Parameter.type
        # What transfer_to_npu sends to an NPU stays here.
        Redirects(REDIRECTS).apply()
        follow(self.card)

    def torch_device(self) -> torch.device:
        return ON_CARD


@contextmanager
def _triton() -> Iterator[None]:
    """Stands in for triton, which MindSpeed imports for kernels that only a card could run."""
    parts = ("", ".language", ".language.extra", ".language.extra.libdevice")
    names = [f"triton{part}" for part in (*parts, ".runtime", ".runtime.driver")]
    package = MagicMock(__spec__=None, __version__="3.2.0")
    package.runtime.driver.active.get_current_target.return_value.backend = "npu"
    with patch.dict(sys.modules, dict.fromkeys(names, package)):
        yield


def _give_it_a_card(npu: Any) -> None:
    npu.is_available = lambda: True
    npu.device_count = lambda: 8
    npu.current_device = lambda: ON_CARD
    npu.set_device = npu.synchronize = npu._lazy_init = lambda *_: None
    npu.set_compile_mode = lambda jit_compile: None
    npu.is_bf16_supported = lambda: True
    npu.max_memory_allocated = lambda: 0
    npu.get_device_name = lambda *_: "Ascend910B3"


def start(wheel: Path, stubs: list[Path], folder: Path, mindspeed: str | None = None) -> None:
    """Activates the emulated NPU in this process, with MindSpeed where its checkout is given."""
    for library in stubs:  # the linker finds what is loaded by its name
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(wheel))
    machine = server(folder)
    if mindspeed is None:
        install(machine, "mindspeed", None)
    else:
        sys.path.insert(0, mindspeed)
    # A process that this one starts finds the wheel, but not the stubs.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    install(machine, "torch", torch.__version__)
    install(machine, "torch_npu", torch.__version__.split("+")[0])
    os.environ.pop("ASCEND_HOME_PATH", None)  # torch_npu would look for the parts of CANN
    npu = EmulatedNpu(replace(machine, environment={**machine.environment, "LOCAL_RANK": "0"}))
    device._devices["npu"] = npu
    npu.activate()
