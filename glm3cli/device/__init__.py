"""The only room that knows which chip the program runs on: CPU, CUDA GPU, or Ascend NPU.

Begin with `base.Device`, the interface, and `cpu.py`, its simplest implementation; `select` finds
the device that `--device` names. `activate()` must be called before the first import of megatron,
which assumes CUDA; afterwards `require_active()` returns the device, and its `kernels` compute the
chip's fused operations (kernels.py in plain torch, npu/kernels.py on NPUs); `choice` puts plain
torch in the place of those that a user doesn't want. `catalog` and `peaks` read chips.toml, the
table of known devices; `planned` and `operations` let forecast/ plan for a device that isn't here.
npu/ is the Ascend NPU, functions/ has operations with gradients of their own, and doctor/
examines the machine.

Rooms above use what this file exports and the modules above by name; no other room may import
torch_npu or MindSpeed, or name a chip. This room imports config/, host/ and errors of ours.
"""

import importlib.util

import torch

from glm3cli.device.base import Device, require_active
from glm3cli.device.cpu import CpuDevice
from glm3cli.device.cuda import CudaDevice
from glm3cli.device.npu.device import NpuDevice

__all__ = ["DEVICES", "PACKAGES", "Device", "find", "require_active", "select"]

DEVICES: dict[str, type[Device]] = {"npu": NpuDevice, "cuda": CudaDevice, "cpu": CpuDevice}
# The packages on whose versions a run's numbers depend; a run's record names them.
PACKAGES = ("torch", "megatron-core", "torch_npu")
_devices: dict[str, Device] = {}


def select(name: str = "auto") -> Device:
    """Returns the device called `name`, always the same object for one name.

    Args:
        name: `npu`, `cuda`, `cpu`, or `auto` for what `find` chooses.
    """
    if name == "auto":
        name = find()
    return _devices.setdefault(name, DEVICES[name]())


def find() -> str:
    """Returns the name of the device that `auto` stands for on this machine.

    It is `npu` if torch_npu is installed, else `cuda` if torch finds a GPU, else `cpu`.
    """
    if importlib.util.find_spec("torch_npu") is not None:
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"
