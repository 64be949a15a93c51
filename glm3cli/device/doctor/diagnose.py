"""What hardware, drivers, and packages are here, and what doesn't fit together."""

import os
import platform

import torch

from glm3cli.device.doctor.cards import cards, check_cards
from glm3cli.device.doctor.machine import Finding, Machine
from glm3cli.device.doctor.versions import cann_home, check_versions
from glm3cli.device.npu import NpuDevice

_SMALL = 2**28  # bytes of shared memory that data loaders and gloo may well need
_LIBRARIES = ("sentencepiece", "safetensors", "pyarrow", "pydantic", "typer", "rich")


def diagnose(machine: Machine | None = None) -> list[Finding]:
    """Looks at everything; imports no vendor package and changes nothing."""
    machine = machine or Machine()
    npu = has_npu(machine)
    return [
        _system(machine),
        *check_versions(machine, npu),
        *(_library(machine, name) for name in _LIBRARIES),
        *_cuda(),
        *(_npu(machine) if npu else [Finding("npu", "no NPU, no torch_npu", "absent")]),
        _shared_memory(machine),
    ]


def has_npu(machine: Machine) -> bool:
    """Whether this machine is to use NPUs: it has some, or the software for them."""
    software = machine.installed("torch_npu") or cann_home(machine)
    return bool(cards(machine)) or software is not None


def _system(machine: Machine) -> Finding:
    cores = len(os.sched_getaffinity(0))
    return Finding("system", f"Python {machine.python}, {platform.machine()}, {cores} cores")


def _library(machine: Machine, name: str) -> Finding:
    found = machine.installed(name)
    if found is None:
        return Finding(name, "missing", "wrong", f"{name} is not installed", f"pip install {name}")
    return Finding(name, found)


def _cuda() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("cuda", "no GPU", "absent")]
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return [Finding("cuda", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")]


def _npu(machine: Machine) -> list[Finding]:
    ours = NpuDevice.environment.items()
    defaults = {name: value for name, value in ours if name not in machine.environment}
    return [
        *check_cards(machine),
        *(Finding(name, f"{value} (default of glm3)") for name, value in defaults.items()),
    ]


def _shared_memory(machine: Machine) -> Finding:
    free = machine.free(machine.file("/dev/shm"))
    found = f"{free / 2**30:.1f} GiB free"
    if free >= _SMALL:
        return Finding("shared memory", found)
    why = f"/dev/shm has {free / 2**20:.0f} MiB free, below {_SMALL / 2**20:.0f} MiB"
    advice = "start the container with a larger --shm-size"
    return Finding("shared memory", found, "wrong", why, advice)
