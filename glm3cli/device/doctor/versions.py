"""The versions that fit together, and checks of those that a machine has.

Sources: the README of MindSpeed's branch core_r0.16.0 (torch, torch_npu 26.0.0, CANN); torch_npu's
COMPATIBILITY.md (which of its packages belongs to which torch and CANN); CANN 9.1.0's release notes
(the drivers that each CANN runs on).
"""

import re
from pathlib import Path

from glm3cli.device.doctor.machine import Finding, Machine
from glm3cli.device.doctor.mindspeed import check_mindspeed
from glm3cli.device.doctor.pins import ALSO, ASCEND, cann_home, pip_install, release, wrong
from glm3cli.errors import DeviceError

TORCH_RANGE = ((2, 7, 1), (2, 14))  # on every device: from the first, and below the second
# torch -> N of torch_npu's .postN -> the CANN that it is built for, from that N on.
_CANN_OF: dict[tuple[int, ...], dict[int, tuple[int, ...]]] = {
    (2, 7, 1): {0: (8, 3), 2: (8, 5), 4: (9, 0), 8: (9, 1)},
    (2, 10, 0): {4: (9, 1)},
}
# CANN -> the oldest driver that it runs on.
_OLDEST_DRIVER: dict[tuple[int, ...], tuple[int, ...]] = {
    (8, 5): (25, 0),
    (9, 0): (25, 0),
    (9, 1): (25, 2),
}


def check_versions(machine: Machine, npu: bool) -> list[Finding]:
    """Reports the installed versions, and whether they fit together.

    Args:
        machine: The machine to look at.
        npu: Whether NPUs are to be used, which need further packages, CANN, and a driver.
    """
    findings = [_torch(machine, npu), _megatron_core(machine)]
    if npu:
        findings += [
            _python(machine),
            _torch_npu(machine),
            _cann(machine),
            _driver(machine),
            *check_mindspeed(machine),
        ]
    return findings


def require_versions(machine: Machine | None = None) -> None:
    """Refuses versions with which NPUs can't work; imports no vendor package.

    Args:
        machine: The machine to look at; by default this one.

    Raises:
        DeviceError: Versions don't fit; the message has a sentence for each of them.
    """
    found = [f for f in check_versions(machine or Machine(), npu=True) if f.verdict == "wrong"]
    if found:
        raise DeviceError(
            "--device npu: " + "; ".join(finding.why for finding in found),
            "; ".join(finding.advice for finding in found),
        )


def cann_version(machine: Machine) -> str | None:
    """Returns the version of CANN's toolkit, or None if no file has it.

    Its install record has a line `version=9.0.0`; in older releases, version.cfg has
    `toolkit_running_version=[7.7.T20.0.B210:8.1.RC1]`.
    """
    home = Path(cann_home(machine) or "")
    for record in sorted(home.glob("*-linux/ascend_toolkit_install.info")):
        if found := re.search(r"^version=(\S+)", machine.read(record), re.M):
            return found[1]
    pattern = r"^toolkit_running_version=\[[^:\]]*:([^\]]+)\]"
    found = re.search(pattern, machine.read(home / "version.cfg"), re.M)
    return found[1] if found else None


def driver_version(machine: Machine) -> str | None:
    """Returns the version of the NPUs' driver, or None; its version.info has `Version=25.5.0`."""
    record = machine.read(machine.file("/etc/ascend_install.info"))
    place = re.search(r"^Driver_Install_Path_Param=(\S+)", record, re.M)
    folder = machine.file(place[1] if place else "/usr/local/Ascend")
    found = re.search(r"^Version=(\S+)", machine.read(folder / "driver/version.info"), re.M)
    return found[1] if found else None


def _tried(subject: str, found: str) -> Finding:
    """Makes a finding that is `ok` for the versions of the pins, and `untried` for any other."""
    for known in (release(pins[subject]) for pins in (ASCEND, ALSO)):
        if release(found)[: len(known)] == known:
            return Finding(subject, found)
    why = f"MindSpeed's branch goes with {subject} {ASCEND[subject]}, here is {found}"
    return Finding(subject, found, "untried", why, "if it fails, install that one")


def _torch(machine: Machine, npu: bool) -> Finding:
    """Reports whether torch is installed and in the range that glm3 runs with."""
    found = machine.installed("torch")
    advice = pip_install(machine, "torch") if npu else "pip install 'torch>=2.7.1,<2.14'"
    if found is None:
        return wrong("torch", "missing", "torch is not installed", advice)
    if not TORCH_RANGE[0] <= release(found) < TORCH_RANGE[1]:
        return wrong("torch", found, f"torch {found} is not >= 2.7.1, < 2.14", advice)
    return _tried("torch", found) if npu else Finding("torch", found)


def _megatron_core(machine: Machine) -> Finding:
    """Reports whether megatron-core is installed and a release 0.16."""
    found = machine.installed("megatron-core")
    advice = f"pip install megatron-core=={ASCEND['megatron-core']}"
    if found is None:
        return wrong("megatron-core", "missing", "megatron-core is not installed", advice)
    if release(found)[:2] != (0, 16):
        return wrong("megatron-core", found, f"megatron-core {found} is not a 0.16", advice)
    return Finding("megatron-core", found)


def _python(machine: Machine) -> Finding:
    """Reports whether Python has the version that fits NPUs."""
    return _tried("Python", machine.python)


def _torch_npu(machine: Machine) -> Finding:
    """Reports whether torch_npu is installed and built for the torch that is here."""
    found, torch = machine.installed("torch_npu"), machine.installed("torch")
    if found is None:
        return wrong("torch_npu", "missing", "torch_npu is not installed", pip_install(machine))
    if torch is not None and release(found)[:3] != release(torch)[:3]:
        built_for = ".".join(map(str, release(found)[:3]))
        why = f"torch_npu {found} is built for torch {built_for}, here is torch {torch}"
        return wrong("torch_npu", found, why, pip_install(machine))
    if found in (ASCEND["torch_npu"], ALSO["torch_npu"]):
        return Finding("torch_npu", found)
    why = f"MindSpeed's branch goes with torch_npu {ASCEND['torch_npu']}, here is {found}"
    return Finding("torch_npu", found, "untried", why, f"if it fails, {pip_install(machine)}")


def _cann(machine: Machine) -> Finding:
    """Reports whether CANN's environment is set, and CANN is new enough for torch_npu."""
    home = cann_home(machine)
    if home is None:
        why = "CANN's environment is not set"
        return wrong("CANN", "environment not set", why, _way_to_cann(machine))
    if not Path(home).is_dir():
        why = f"ASCEND_HOME_PATH={home} is no folder"
        return wrong("CANN", home, why, _way_to_cann(machine))
    found = cann_version(machine)
    if found is None:
        why = f"CANN's version stands in no file of {home}"
        return Finding("CANN", home, "untried", why, f"see that it is {ASCEND['CANN']}")
    needed = _needed_cann(machine.installed("torch_npu") or "")
    if needed and release(found) < needed:
        names = f"torch_npu {machine.installed('torch_npu')} is built for CANN {_dotted(needed)}"
        advice = f"install CANN {_dotted(needed)}, or the torch_npu that belongs to yours"
        return wrong("CANN", found, f"{names}, here is CANN {found}", advice)
    return _tried("CANN", found)


def _way_to_cann(machine: Machine) -> str:
    """Returns the command that sets the environment of the CANN that is here, or how to get one."""
    homes = ("/usr/local/Ascend", machine.environment.get("HOME", "/root") + "/Ascend")
    for home in homes:
        for folder in ("cann", "ascend-toolkit"):
            if machine.file(f"{home}/{folder}/set_env.sh").is_file():
                return f"source {home}/{folder}/set_env.sh"
    return f"install CANN {ASCEND['CANN']} (Toolkit, ops, NNAL), and source its set_env.sh"


def _needed_cann(torch_npu: str) -> tuple[int, ...] | None:
    """Returns the release of CANN that a torch_npu is built for, or None if it isn't known."""
    post = re.search(r"\.post(\d+)", torch_npu)
    number = int(post[1]) if post else 0
    table = _CANN_OF.get(release(torch_npu), {})
    firsts = [first for first in table if first <= number]
    return table[max(firsts)] if firsts else None


def _driver(machine: Machine) -> Finding:
    """Reports whether the driver is new enough for CANN."""
    found = driver_version(machine)
    if found is None:
        why = "the driver's version.info is not here"
        advice = "in a container, mount /usr/local/Ascend/driver"
        return Finding("driver", "unknown", "untried", why, advice)
    cann = cann_version(machine) or ASCEND["CANN"]
    oldest = _OLDEST_DRIVER.get(release(cann)[:2])
    if oldest and release(found) < oldest:
        why = f"driver {found} is older than the {_dotted(oldest)} that CANN {cann} needs"
        return wrong("driver", found, why, f"install driver {_dotted(oldest)} or newer")
    return Finding("driver", found)


def _dotted(numbers: tuple[int, ...]) -> str:
    """Returns the numbers of a version with dots between them."""
    return ".".join(map(str, numbers))
