"""Checks of NPUs: their number, who may use them, how many ranks they are for, and their network.

The rules of ASCEND_RT_VISIBLE_DEVICES and of HCCL's variables are those of CANN 9.0's reference of
environment variables.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from glm3cli.device.doctor.machine import Finding, Machine
from glm3cli.errors import DeviceError
from glm3cli.host.environment import number_of

_VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"  # read by CANN
_PASSED = "ASCEND_VISIBLE_DEVICES"  # read by Ascend's container runtime
_COMPANIONS = ("davinci_manager", "devmm_svm", "hisi_hdc")
_CONNECT_TIMEOUT = (120, 7200)  # seconds
_GROUP = "HwHiAiUser"
_HUAWEI = "0x19e5"
_OLD = "Ascend 910A"
_KINDS = {"0xd801": _OLD, "0xd802": "Ascend 910B", "0xd803": "Ascend 910C"}


def cards(machine: Machine) -> list[int]:
    """Returns the numbers of the NPUs that a machine or container has, in order."""
    names = (path.name for path in machine.file("/dev").glob("davinci*"))
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"davinci(\d+)", name)))


def num_visible(machine: Machine) -> int:
    """Returns how many NPUs a process may use, by ASCEND_RT_VISIBLE_DEVICES.

    CANN counts the NPUs of a container from 0 on. It reads the variable up to the first item that
    is no such number or isn't above the one before.
    """
    count = len(cards(machine))
    setting = machine.environment.get(_VISIBLE)
    if setting is None:
        return count
    numbers: list[int] = []
    for part in setting.split(","):
        above = numbers[-1] if numbers else -1
        if not (re.fullmatch(r"\d+", part) and above < int(part) < count):
            break
        numbers.append(int(part))
    return len(numbers)


def num_local_ranks(environment: Mapping[str, str]) -> int:
    """Returns how many ranks a machine has at least.

    torchrun sets that number (LOCAL_WORLD_SIZE); without it, this rank's own number is the last.
    """
    rank = number_of("LOCAL_RANK", 0, environment)
    return number_of("LOCAL_WORLD_SIZE", rank + 1, environment)


def require_cards(machine: Machine | None = None, num_ranks: int | None = None) -> None:
    """Refuses a start with more ranks than NPUs, or with NPUs that the user may not open.

    Args:
        machine: The machine that the ranks run on; by default this one.
        num_ranks: Number of ranks on that machine; by default the number that its launcher set.

    Raises:
        DeviceError: The machine's ranks can't each have an NPU.
    """
    machine = machine or Machine()
    num_ranks = num_ranks or num_local_ranks(machine.environment)
    checks = (_devices(machine), _kind(machine), _permission(machine), _ranks(machine, num_ranks))
    for finding in checks:
        if finding.verdict == "wrong":
            raise DeviceError(f"--device npu: {finding.why}", finding.advice)


def check_cards(machine: Machine) -> list[Finding]:
    """Reports the NPUs of a machine, who may use them, and the settings of their network."""
    findings = [_devices(machine)]
    if cards(machine):
        findings += [check(machine) for check in (_kind, _permission, _visible, _passed)]
        findings.append(_ranks(machine, num_local_ranks(machine.environment)))
    return [*findings, _npu_smi(machine), *_network(machine)]


def _devices(machine: Machine) -> Finding:
    """Reports the number of NPUs, and the device files that they need beside their own."""
    count = len(cards(machine))
    if not count:
        advice = "see `npu-smi info`; a container needs --device /dev/davinci0 and so on"
        return Finding("npu", "no card", "wrong", "there is no NPU (/dev/davinci*)", advice)
    missing = [name for name in _COMPANIONS if not machine.file(f"/dev/{name}").exists()]
    if missing:
        names = " ".join(f"/dev/{name}" for name in missing)
        options = " ".join(f"--device /dev/{name}" for name in missing)
        why = f"NPUs are here, but not {names}"
        return Finding("npu", f"{count} card(s)", "wrong", why, f"pass {options} to the container")
    return Finding("npu", f"{count} card(s)")


def _kind(machine: Machine) -> Finding:
    """Reports which generation the NPUs are of, by their ids on the PCI bus.

    The Ascend 910A isn't for glm3. It has neither bf16 nor the fused operators for attention,
    SwiGLU and cross-entropy (their documents name Atlas A2 and A3 alone), and its fp16 saturates
    instead of overflowing, so that no loss scale could be found.
    """
    found = set()
    for device in machine.file("/sys/bus/pci/devices").glob("*"):
        if machine.read(device / "vendor").strip() == _HUAWEI:
            found.add(_KINDS.get(machine.read(device / "device").strip()))
    names = sorted(filter(None, found))
    if _OLD not in names:
        return Finding("chip", ", ".join(names) or "unknown", "ok" if names else "absent")
    why = f"{_OLD} has no bf16 and no fused attention, and its fp16 never overflows"
    advice = "use an Ascend 910B or newer, or --device cpu"
    return Finding("chip", _OLD, "wrong", why, advice)


def _permission(machine: Machine) -> Finding:
    """Reports whether the user may open the device files of the NPUs."""
    names = (*_COMPANIONS, *(f"davinci{card}" for card in cards(machine)))
    paths = filter(Path.exists, (machine.file(f"/dev/{name}") for name in names))
    closed = [f"/dev/{path.name}" for path in paths if not machine.may_open(path)]
    if not closed:
        return Finding("permission", "the user may open the devices")
    why = f"the user may not open {', '.join(closed)}"
    advice = f"sudo usermod -aG {_GROUP} $USER, and log in again"
    return Finding("permission", f"{len(closed)} device(s) closed", "wrong", why, advice)


def _visible(machine: Machine) -> Finding:
    """Reports how many NPUs ASCEND_RT_VISIBLE_DEVICES leaves, and whether CANN reads all of it."""
    setting, count = machine.environment.get(_VISIBLE), num_visible(machine)
    if setting is None:
        return Finding("visible", f"{count}, {_VISIBLE} is not set")
    found = f"{count}, {_VISIBLE}={setting}"
    if count == len(setting.split(",")):
        return Finding("visible", found)
    here = len(cards(machine))
    why = f"{_VISIBLE}={setting} is read up to its first {count} number(s)"
    advice = f"give numbers from 0 to {here - 1} that go up, with commas and without spaces"
    return Finding("visible", found, "wrong", why, advice)


def _passed(machine: Machine) -> Finding:
    """Reports whether a container has got the NPUs that ASCEND_VISIBLE_DEVICES asks for."""
    setting, here = machine.environment.get(_PASSED, ""), len(cards(machine))
    asked = _num_named(setting)
    if asked <= here:
        return Finding("container", f"{_PASSED}={setting}" if setting else f"{_PASSED} is not set")
    why = f"{_PASSED}={setting} names {asked} NPUs, but {here} are here"
    advice = "start the container with --runtime ascend, or with --device for each NPU"
    return Finding("container", f"{_PASSED}={setting}", "wrong", why, advice)


def _num_named(setting: str) -> int:
    """Returns how many NPUs a value like `0-3,6` or `Ascend910-0,Ascend910-1` names."""
    total = 0
    for part in setting.split(","):
        if span := re.fullmatch(r"\s*(\d+)-(\d+)\s*", part):
            total += int(span[2]) - int(span[1]) + 1
        elif re.fullmatch(r"\s*([A-Za-z]\w*-)?\d+\s*", part):
            total += 1
    return total


def _ranks(machine: Machine, ranks: int) -> Finding:
    """Reports whether there is an NPU for each of the machine's ranks."""
    count = num_visible(machine)
    if ranks <= count:
        return Finding("local ranks", f"{ranks} on {count} NPU(s)")
    setting = machine.environment.get(_VISIBLE)
    why = f"{ranks} rank(s) on this machine, but {count} visible NPU(s)"
    why += f" ({_VISIBLE}={setting})" if setting is not None else ""
    advice = "start as many ranks (--nproc, --nproc_per_node) as there are NPUs"
    return Finding("local ranks", f"{ranks} on {count} NPU(s)", "wrong", why, advice)


def _npu_smi(machine: Machine) -> Finding:
    """Reports whether the vendor's npu-smi is there, which nothing here needs."""
    found = machine.program("npu-smi")
    if found:
        return Finding("npu-smi", found)
    why = "npu-smi is not on the PATH; nothing here needs it"
    advice = "in a container, mount /usr/local/bin/npu-smi"
    return Finding("npu-smi", "missing", "absent", why, advice)


def _network(machine: Machine) -> list[Finding]:
    """Reports the user's settings of HCCL, and which of them would make it fail."""
    given = {n: v for n, v in sorted(machine.environment.items()) if n.startswith("HCCL_")}
    checks = {"HCCL_CONNECT_TIMEOUT": _timeout, "HCCL_SOCKET_IFNAME": _interface}
    return [
        checks[name](machine, value) if name in checks else Finding(name, value)
        for name, value in given.items()
    ]


def _timeout(_: Machine, value: str) -> Finding:
    """Reports whether HCCL accepts a value of HCCL_CONNECT_TIMEOUT."""
    low, high = _CONNECT_TIMEOUT
    if re.fullmatch(r"\d+", value) and low <= int(value) <= high:
        return Finding("HCCL_CONNECT_TIMEOUT", value)
    why = f"HCCL_CONNECT_TIMEOUT={value} is no whole number of seconds from {low} to {high}"
    return Finding("HCCL_CONNECT_TIMEOUT", value, "wrong", why, "mend or unset it")


def _interface(machine: Machine, value: str) -> Finding:
    """Reports whether a value of HCCL_SOCKET_IFNAME leaves a network card of the machine."""
    here = sorted(path.name for path in machine.file("/sys/class/net").glob("*"))
    if not here or any(_means(value, name) for name in here):
        return Finding("HCCL_SOCKET_IFNAME", value)
    why = f"HCCL_SOCKET_IFNAME={value} leaves none of the network cards {', '.join(here)}"
    return Finding("HCCL_SOCKET_IFNAME", value, "wrong", why, "name one of them")


def _means(value: str, name: str) -> bool:
    """Returns whether a value of HCCL_SOCKET_IFNAME picks the network card `name`.

    `eth,ens` picks the names that begin so, `=eth0` this name only, and a `^` in front picks all
    others.
    """
    excludes, rest = value.startswith("^"), value.removeprefix("^")
    exact, names = rest.startswith("="), rest.removeprefix("=").split(",")
    named = name in names if exact else name.startswith(tuple(names))
    return named != excludes
