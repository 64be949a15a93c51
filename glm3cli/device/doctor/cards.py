"""NPUs and what surrounds them: which a process may use, and for how many ranks they do.

The rules of ASCEND_RT_VISIBLE_DEVICES and of HCCL's variables are those of CANN 9.0's reference of
environment variables.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from glm3cli.device.doctor.machine import Finding, Machine
from glm3cli.errors import DeviceError

_VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"  # read by CANN
_PASSED = "ASCEND_VISIBLE_DEVICES"  # read by Ascend's container runtime
_COMPANIONS = ("davinci_manager", "devmm_svm", "hisi_hdc")
_CONNECT_TIMEOUT = (120, 7200)  # seconds
_GROUP = "HwHiAiUser"


def cards(machine: Machine) -> list[int]:
    """The numbers of the NPUs that this machine or container has."""
    names = (path.name for path in machine.file("/dev").glob("davinci*"))
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"davinci(\d+)", name)))


def num_visible(machine: Machine) -> int:
    """How many NPUs a process may use.

    CANN counts those of a container from 0 on, and reads its variable up to the first thing that
    is no such number or not above the one before.
    """
    count = len(cards(machine))
    told = machine.environment.get(_VISIBLE)
    if told is None:
        return count
    numbers: list[int] = []
    for part in told.split(","):
        above = numbers[-1] if numbers else -1
        if not (re.fullmatch(r"\d+", part) and above < int(part) < count):
            break
        numbers.append(int(part))
    return len(numbers)


def num_local_ranks(environment: Mapping[str, str]) -> int:
    """How many ranks this machine has at least: torchrun's number, else by this rank's own."""
    rank = int(environment.get("LOCAL_RANK", "0"))
    return int(environment.get("LOCAL_WORLD_SIZE", rank + 1))


def require_cards(machine: Machine | None = None, num_ranks: int | None = None) -> None:
    """Refuses a start with more ranks than NPUs, or with NPUs that the user may not open.

    Args:
        machine: By default this one.
        num_ranks: Ranks that are to run on it; by default as many as its launcher says.

    Raises:
        DeviceError: This machine's ranks can't each have an NPU.
    """
    machine = machine or Machine()
    num_ranks = num_ranks or num_local_ranks(machine.environment)
    for finding in (_devices(machine), _permission(machine), _ranks(machine, num_ranks)):
        if finding.verdict == "wrong":
            raise DeviceError(f"--device npu: {finding.why}", finding.advice)


def check_cards(machine: Machine) -> list[Finding]:
    """The NPUs, who may use them, and the settings of their network."""
    findings = [_devices(machine)]
    if cards(machine):
        findings += [check(machine) for check in (_permission, _visible, _passed)]
        findings.append(_ranks(machine, num_local_ranks(machine.environment)))
    return [*findings, _npu_smi(machine), *_network(machine)]


def _devices(machine: Machine) -> Finding:
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


def _permission(machine: Machine) -> Finding:
    names = (*_COMPANIONS, *(f"davinci{card}" for card in cards(machine)))
    paths = filter(Path.exists, (machine.file(f"/dev/{name}") for name in names))
    closed = [f"/dev/{path.name}" for path in paths if not machine.may_open(path)]
    if not closed:
        return Finding("permission", "the user may open the devices")
    why = f"the user may not open {', '.join(closed)}"
    advice = f"sudo usermod -aG {_GROUP} $USER, and log in again"
    return Finding("permission", f"{len(closed)} device(s) closed", "wrong", why, advice)


def _visible(machine: Machine) -> Finding:
    told, count = machine.environment.get(_VISIBLE), num_visible(machine)
    if told is None:
        return Finding("visible", f"{count}, {_VISIBLE} is not set")
    found = f"{count}, {_VISIBLE}={told}"
    if count == len(told.split(",")):
        return Finding("visible", found)
    here = len(cards(machine))
    why = f"{_VISIBLE}={told} is read up to its first {count} number(s)"
    advice = f"give numbers from 0 to {here - 1} that go up, with commas and without spaces"
    return Finding("visible", found, "wrong", why, advice)


def _passed(machine: Machine) -> Finding:
    told, here = machine.environment.get(_PASSED, ""), len(cards(machine))
    asked = _num_named(told)
    if asked <= here:
        return Finding("container", f"{_PASSED}={told}" if told else f"{_PASSED} is not set")
    why = f"{_PASSED}={told} names {asked} NPUs, but {here} are here"
    advice = "start the container with --runtime ascend, or with --device for each NPU"
    return Finding("container", f"{_PASSED}={told}", "wrong", why, advice)


def _num_named(told: str) -> int:
    """How many NPUs a value like `0-3,6` or `Ascend910-0,Ascend910-1` names."""
    total = 0
    for part in told.split(","):
        if span := re.fullmatch(r"\s*(\d+)-(\d+)\s*", part):
            total += int(span[2]) - int(span[1]) + 1
        elif re.fullmatch(r"\s*([A-Za-z]\w*-)?\d+\s*", part):
            total += 1
    return total


def _ranks(machine: Machine, ranks: int) -> Finding:
    count = num_visible(machine)
    if ranks <= count:
        return Finding("local ranks", f"{ranks} on {count} NPU(s)")
    told = machine.environment.get(_VISIBLE)
    why = f"{ranks} rank(s) on this machine, but {count} visible NPU(s)"
    why += f" ({_VISIBLE}={told})" if told is not None else ""
    advice = "start as many ranks (--nproc, --nproc_per_node) as there are NPUs"
    return Finding("local ranks", f"{ranks} on {count} NPU(s)", "wrong", why, advice)


def _npu_smi(machine: Machine) -> Finding:
    found = machine.program("npu-smi")
    if found:
        return Finding("npu-smi", found)
    why = "npu-smi is not on the PATH; nothing here needs it"
    advice = "in a container, mount /usr/local/bin/npu-smi"
    return Finding("npu-smi", "missing", "absent", why, advice)


def _network(machine: Machine) -> list[Finding]:
    """HCCL's settings that the user has made, those that make it fail among them."""
    given = {n: v for n, v in sorted(machine.environment.items()) if n.startswith("HCCL_")}
    checks = {"HCCL_CONNECT_TIMEOUT": _timeout, "HCCL_SOCKET_IFNAME": _interface}
    return [
        checks[name](machine, value) if name in checks else Finding(name, value)
        for name, value in given.items()
    ]


def _timeout(_: Machine, value: str) -> Finding:
    low, high = _CONNECT_TIMEOUT
    if re.fullmatch(r"\d+", value) and low <= int(value) <= high:
        return Finding("HCCL_CONNECT_TIMEOUT", value)
    why = f"HCCL_CONNECT_TIMEOUT={value} is no whole number of seconds from {low} to {high}"
    return Finding("HCCL_CONNECT_TIMEOUT", value, "wrong", why, "mend or unset it")


def _interface(machine: Machine, value: str) -> Finding:
    here = sorted(path.name for path in machine.file("/sys/class/net").glob("*"))
    if not here or any(_means(value, name) for name in here):
        return Finding("HCCL_SOCKET_IFNAME", value)
    why = f"HCCL_SOCKET_IFNAME={value} leaves none of the network cards {', '.join(here)}"
    return Finding("HCCL_SOCKET_IFNAME", value, "wrong", why, "name one of them")


def _means(value: str, name: str) -> bool:
    """Whether a value picks a network card: `eth` by its begin, `=eth0` whole; `^` all others."""
    excludes, rest = value.startswith("^"), value.removeprefix("^")
    exact, names = rest.startswith("="), rest.removeprefix("=").split(",")
    named = name in names if exact else name.startswith(tuple(names))
    return named != excludes
