"""The one place that knows which chip we run on."""

import importlib.util

import torch

from glm3cli.device.base import Device, require_active
from glm3cli.device.cpu import CpuDevice
from glm3cli.device.cuda import CudaDevice
from glm3cli.device.npu import NpuDevice

__all__ = ["DEVICES", "PACKAGES", "Device", "find", "require_active", "select"]

DEVICES: dict[str, type[Device]] = {"npu": NpuDevice, "cuda": CudaDevice, "cpu": CpuDevice}
# The packages on whose versions a run's numbers depend; a run's record names them.
PACKAGES = ("torch", "megatron-core", "torch_npu")
_devices: dict[str, Device] = {}


def select(name: str = "auto") -> Device:
    """The device called `name`; `auto` is an NPU if torch_npu is here, else CUDA, else the CPU."""
    if name == "auto":
        name = find()
    return _devices.setdefault(name, DEVICES[name]())


def find() -> str:
    """What `auto` stands for on this machine."""
    if importlib.util.find_spec("torch_npu") is not None:
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"
