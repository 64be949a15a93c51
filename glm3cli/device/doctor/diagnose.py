"""`diagnose`: what hardware, drivers, and packages a machine has, and what doesn't fit together."""

import os
import platform

import torch

from glm3cli.device.doctor.cards import cards, check_cards
from glm3cli.device.doctor.environment import ENVIRONMENT
from glm3cli.device.doctor.machine import Finding, Machine
from glm3cli.device.doctor.pins import cann_home
from glm3cli.device.doctor.versions import check_versions

_SMALL = 2**28  # bytes of shared memory that data loaders and gloo may well need
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # of torch/__init__.py: _import_device_backends
_LIBRARIES = ("sentencepiece", "safetensors", "pyarrow", "pydantic", "typer", "rich")


def diagnose(machine: Machine | None = None) -> list[Finding]:
    """Returns the report of `glm3 doctor`; imports no vendor package and changes nothing.

    Args:
        machine: The machine to look at; by default this one. Its GPUs are always this one's.
    """
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
    """Returns whether a machine is meant to use NPUs: it has some, or the software for them."""
    software = machine.installed("torch_npu") or cann_home(machine)
    return bool(cards(machine)) or software is not None


def _system(machine: Machine) -> Finding:
    """Reports the machine's Python, architecture, and the cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    return Finding("system", f"Python {machine.python}, {platform.machine()}, {cores} cores")


def _library(machine: Machine, name: str) -> Finding:
    """Reports the version of a package that glm3 needs; a missing one is wrong."""
    found = machine.installed(name)
    if found is None:
        return Finding(name, "missing", "wrong", f"{name} is not installed", f"pip install {name}")
    return Finding(name, found)


def _cuda() -> list[Finding]:
    """Reports the number and names of the GPUs that torch finds here."""
    if not torch.cuda.is_available():
        return [Finding("cuda", "no GPU", "absent")]
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return [Finding("cuda", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")]


def _npu(machine: Machine) -> list[Finding]:
    """Reports NPUs and their network, and the variables that glm3 would set."""
    given = machine.environment
    defaults = {name: value for name, value in ENVIRONMENT.items() if name not in given}
    return [
        *check_cards(machine),
        _autoload(machine),
        *(Finding(name, f"{value} (default of glm3)") for name, value in defaults.items()),
    ]


def _autoload(machine: Machine) -> Finding:
    """Reports whether torchrun, too, leaves it to glm3 to import torch_npu."""
    setting = machine.exported(_AUTOLOAD)
    if setting == "0":
        return Finding("torchrun", f"{_AUTOLOAD}=0")
    why = "torchrun imports torch_npu itself, and where that fails, glm3 can't say why"
    return Finding("torchrun", "imports torch_npu", "untried", why, f"export {_AUTOLOAD}=0")


def _shared_memory(machine: Machine) -> Finding:
    """Reports the free room of /dev/shm; below `_SMALL` it is wrong."""
    free = machine.free(machine.file("/dev/shm"))
    found = f"{free / 2**30:.1f} GiB free"
    if free >= _SMALL:
        return Finding("shared memory", found)
    why = f"/dev/shm has {free / 2**20:.0f} MiB free, below {_SMALL / 2**20:.0f} MiB"
    advice = "start the container with a larger --shm-size"
    return Finding("shared memory", found, "wrong", why, advice)
