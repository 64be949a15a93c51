"""The versions for Ascend NPUs, and the commands that install them."""

import re

from glm3cli.device.doctor.machine import Finding, Machine

# The versions for Ascend NPUs. glm3 runs with other versions of torch, too, but MindSpeed's branch
# names this one.
ASCEND = {
    "Python": "3.11",
    "torch": "2.7.1",
    "torch_npu": "2.7.1.post4",
    "MindSpeed": "core_r0.16.0",
    "megatron-core": "0.16.1",
    "CANN": "9.0",
    "driver": "25.0",
}
# What is newer and fits as well: the operators that glm3 calls have the same arguments there.
ALSO = {**ASCEND, "torch": "2.10.0", "torch_npu": "2.10.0.post4", "CANN": "9.1"}
_INDEX = "https://download.pytorch.org/whl/cpu"


def pip_install(machine: Machine, *packages: str) -> str:
    """Returns the command that installs torch and torch_npu, or one of them, in these versions.

    On x86_64 torch_npu asks for torch's CPU build by its local version, 2.7.1+cpu, which is in
    torch's own index alone; on aarch64 there is no other build.

    Args:
        machine: The machine to install on.
        packages: `torch`, `torch_npu`; both unless given.
    """
    is_x86 = machine.architecture == "x86_64"
    pins = {
        "torch": f"torch=={ASCEND['torch']}{'+cpu' if is_x86 else ''}",
        "torch_npu": f"torch-npu=={ASCEND['torch_npu']}",
    }
    wanted = " ".join(pins[name] for name in packages or pins)
    return f"pip install {wanted}" + (f" --extra-index-url {_INDEX}" if is_x86 else "")


def release(version: str) -> tuple[int, ...]:
    """Returns the numbers at a version's start, (2, 7, 1) for 2.7.1.post4, (8, 1) for 8.1.RC1."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else ()


def cann_home(machine: Machine) -> str | None:
    """Returns the folder of CANN's toolkit that its set_env.sh has set, or None."""
    names = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
    return next(filter(None, map(machine.environment.get, names)), None)


def wrong(subject: str, found: str, why: str, advice: str) -> Finding:
    """Makes a finding with the verdict `wrong`."""
    return Finding(subject, found, "wrong", why, advice)
