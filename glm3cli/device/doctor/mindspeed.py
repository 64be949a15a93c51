"""Checks of MindSpeed and of what it needs when it is imported.

It imports kernels that are written for Triton, whatever it is asked for. triton-ascend compiles a
part of its driver then, against CANN's headers (triton/backends/ascend/utils.py 3.2.0). Sources:
MindSpeed's branch core_r0.16.0, requirements.txt and features_manager/megatron_basic.
"""

import json
import re
from pathlib import Path
from typing import Any

from glm3cli.device.doctor.machine import Finding, Machine
from glm3cli.device.doctor.pins import ASCEND, cann_home, release, wrong

# The consequences of a missing MindSpeed, as a user reads them.
LOST = (
    "MindSpeed is not installed: its fixes of megatron-core for NPUs are missing, and plain "
    "torch_npu is used"
)
_INSTALL = (
    f"git clone -b {ASCEND['MindSpeed']} https://gitcode.com/Ascend/MindSpeed.git && "
    "pip install -e MindSpeed"
)


# What importing MindSpeed imports, of all that its requirements.txt asks for.
_IMPORTED = ("einops", "protobuf", "pybind11")
# NVIDIA's packages that MindSpeed takes for its own stand-ins.
_NVIDIAS = ("transformer-engine", "transformer_engine")
_COMPILERS = ("clang++", "g++")


def check_mindspeed(machine: Machine) -> list[Finding]:
    """Reports whether MindSpeed is installed and for our megatron-core, and what it needs."""
    findings = [_mindspeed(machine)]
    if has_mindspeed(machine):
        checks = (_triton, _requirements, _compiler, _bisheng, _headers, _transformer_engine)
        findings += [check(machine) for check in checks]
    return findings


def has_mindspeed(machine: Machine) -> bool:
    """Returns whether MindSpeed can be imported."""
    return bool(machine.distribution("mindspeed") or machine.source_of("mindspeed"))


def _mindspeed(machine: Machine) -> Finding:
    """Reports whether MindSpeed is installed, and from the branch for our megatron-core."""
    package = machine.distribution("mindspeed")
    origin = json.loads(package.read_text("direct_url.json") or "{}") if package else {}
    source = _folder_of(origin) or machine.source_of("mindspeed")
    if package is None and source is None:
        return Finding("MindSpeed", "missing", "untried", LOST, _INSTALL)
    version = package.version if package else _version_of(machine, source)
    branch = origin.get("vcs_info", {}).get("requested_revision") or _branch_of(machine, source)
    found = f"{version} ({branch})" if branch else version
    # The branch decides: it may have been changed since the version was noted down.
    if branch == ASCEND["MindSpeed"] or (branch is None and release(version)[:2] == (0, 16)):
        return Finding("MindSpeed", found)
    if version.startswith("0.0."):
        why = f"mindspeed {version} is PyPI's placeholder, which is empty"
        return wrong("MindSpeed", found, why, f"pip uninstall mindspeed && {_INSTALL}")
    why = f"MindSpeed {found} is not for megatron-core 0.16, as its branch core_r0.16.0 is"
    return wrong("MindSpeed", found, why, _INSTALL)


def _folder_of(origin: dict[str, Any]) -> Path | None:
    """Returns the source of an editable install, from the record that pip keeps (PEP 610)."""
    editable = origin.get("dir_info", {}).get("editable")
    return Path(str(origin["url"]).removeprefix("file://")) if editable else None


def _version_of(machine: Machine, source: Path | None) -> str:
    """Returns the version that the setup.py of a source has, or `unknown`."""
    text = machine.read(source / "setup.py") if source else ""
    found = re.search(r"^__version__ = ['\"]([^'\"]+)", text, re.M)
    return found[1] if found else "unknown"


def _branch_of(machine: Machine, source: Path | None) -> str | None:
    """Returns the git branch that is checked out in a source, or None."""
    head = machine.read(source / ".git/HEAD").strip() if source else ""
    return head.removeprefix("ref: refs/heads/") if head.startswith("ref: ") else None


def _triton(machine: Machine) -> Finding:
    """Reports whether triton-ascend is installed, and not overwritten by plain triton."""
    found, plain = machine.installed("triton-ascend"), machine.installed("triton")
    if found is None:
        why = "triton-ascend, which MindSpeed imports, is not installed"
        return wrong("triton", plain or "missing", why, "pip install triton-ascend")
    if plain is not None and plain != found:
        why = f"triton {plain} has overwritten files of triton-ascend {found}"
        again = "pip uninstall -y triton triton-ascend && pip install triton-ascend"
        return wrong("triton", f"triton {plain}", why, again)
    return Finding("triton", f"triton-ascend {found}")


def _requirements(machine: Machine) -> Finding:
    """Reports whether the packages are installed that MindSpeed imports."""
    missing = [name for name in _IMPORTED if machine.installed(name) is None]
    if not missing:
        return Finding("requirements", ", ".join(_IMPORTED))
    names = " ".join(missing)
    why = f"MindSpeed imports {', '.join(missing)}, which isn't installed"
    return wrong("requirements", "incomplete", why, f"pip install {names}")


def _compiler(machine: Machine) -> Finding:
    """Reports whether there is a C++ compiler, with which triton-ascend makes its driver."""
    given = machine.environment.get("CC")
    found = next(
        filter(None, map(machine.program, (*([given] if given else []), *_COMPILERS))), None
    )
    if found:
        return Finding("C++ compiler", found)
    why = "triton-ascend, which MindSpeed imports, finds neither clang++ nor g++ on the PATH"
    return wrong("C++ compiler", "missing", why, "apt install g++, or dnf install gcc-c++")


def _bisheng(machine: Machine) -> Finding:
    """Reports whether CANN's compiler is on the PATH."""
    found = machine.program("bisheng")
    if found:
        return Finding("bisheng", found)
    why = "CANN's compiler bisheng, which triton-ascend looks for, is not on the PATH"
    return wrong("bisheng", "missing", why, "source the set_env.sh of CANN's Toolkit, which has it")


def _headers(machine: Machine) -> Finding:
    """Reports whether CANN's headers are there, which its Toolkit has and its runtime hasn't."""
    home = cann_home(machine)
    if home is None:
        return Finding("CANN's headers", "environment not set", "absent")
    if (Path(home) / "include/acl/acl.h").is_file():
        return Finding("CANN's headers", f"{home}/include")
    why = f"{home}/include has no acl/acl.h, against which triton-ascend compiles"
    return wrong("CANN's headers", "missing", why, "install CANN's Toolkit, not its runtime alone")


def _transformer_engine(machine: Machine) -> Finding:
    """Reports NVIDIA's transformer_engine, in whose place MindSpeed puts its own."""
    found = next(filter(None, map(machine.installed, _NVIDIAS)), None)
    if found is None:
        return Finding("transformer_engine", "not installed")
    why = f"NVIDIA's transformer_engine {found} is in the way of MindSpeed's stand-in"
    return wrong("transformer_engine", found, why, f"pip uninstall -y {_NVIDIAS[0]}")
