"""What hardware, drivers, and packages are here, and what doesn't fit together."""

import importlib.util
import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from glm3cli import __version__

Verdict = Literal["ok", "absent", "wrong"]
# The versions that were tried together: on a CPU or GPU, and on Ascend.
MEGATRON_CORE = "0.16"
TORCH_RANGE = ((2, 7, 1), (2, 14, 0))  # from, and below
ASCEND_TORCH = "2.7.1"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        verdict: `ok`; `absent` for something that this machine may do without; `wrong` for what
            won't work.
        advice: The way out, where there is something to mend.
    """

    subject: str
    found: str
    verdict: Verdict
    advice: str = ""


def diagnose() -> list[Finding]:
    """Looks at everything; imports no vendor package and changes nothing."""
    return [_system(), *_packages(), *_cuda(), *_ascend(), _shared_memory()]


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The versions that a result depends on; `absent` for what isn't installed."""
    packages = ("torch", "megatron-core", "torch_npu")
    return {"glm3": __version__} | {name: installed(name) or "absent" for name in packages}


def _system() -> Finding:
    cores = len(os.sched_getaffinity(0))
    return Finding(
        "system", f"Python {platform.python_version()}, {platform.machine()}, {cores} cores", "ok"
    )


def _packages() -> list[Finding]:
    numbers = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:3])
    fits = TORCH_RANGE[0] <= numbers < TORCH_RANGE[1]
    findings = [
        Finding(
            "torch",
            torch.__version__,
            "ok" if fits else "wrong",
            "" if fits else "install torch >= 2.7.1, < 2.14",
        )
    ]
    core = installed("megatron-core")
    fits = core is not None and core.startswith(MEGATRON_CORE + ".")
    advice = "" if fits else f"pip install 'megatron-core=={MEGATRON_CORE}.1'"
    findings.append(Finding("megatron-core", core or "missing", "ok" if fits else "wrong", advice))
    for package in ("sentencepiece", "safetensors", "pyarrow", "pydantic", "typer", "rich"):
        found = installed(package)
        findings.append(
            Finding(
                package,
                found or "missing",
                "ok" if found else "wrong",
                "" if found else f"pip install {package}",
            )
        )
    return findings


def _cuda() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("cuda", "no GPU", "absent")]
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return [Finding("cuda", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}", "ok")]


def _ascend() -> list[Finding]:
    """torch_npu, CANN's environment, and MindSpeed; looked at without importing them."""
    cards = sorted(Path("/dev").glob("davinci[0-9]*"))
    torch_npu = installed("torch_npu")
    if not cards and torch_npu is None:
        return [Finding("npu", "no NPU, no torch_npu", "absent")]
    findings = [
        Finding("npu", f"{len(cards)} card(s)", "ok")
        if cards
        else Finding(
            "npu", "no card", "wrong", "see `npu-smi info`, and what the container passes"
        ),
        _torch_npu(torch_npu),
    ]
    cann = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    findings.append(
        Finding("CANN", cann, "ok")
        if cann
        else Finding(
            "CANN",
            "environment not set",
            "wrong",
            "source /usr/local/Ascend/ascend-toolkit/set_env.sh",
        )
    )
    mindspeed = importlib.util.find_spec("mindspeed") is not None
    findings.append(
        Finding(
            "MindSpeed",
            installed("mindspeed") or ("from source" if mindspeed else "missing"),
            "ok" if mindspeed else "wrong",
            "" if mindspeed else "install its branch core_r0.16.0 from source",
        )
    )
    return findings


def _torch_npu(found: str | None) -> Finding:
    advice = f"install torch {ASCEND_TORCH} and torch_npu {ASCEND_TORCH}"
    if found is None:
        return Finding("torch_npu", "missing", "wrong", advice)
    if found.split(".post")[0] != torch.__version__.split("+")[0]:
        return Finding("torch_npu", f"{found} beside torch {torch.__version__}", "wrong", advice)
    return Finding("torch_npu", found, "ok")


def _shared_memory() -> Finding:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    small = free < 2**28
    return Finding(
        "shared memory",
        f"{free / 2**30:.1f} GiB free",
        "wrong" if small else "ok",
        "start the container with a larger --shm-size" if small else "",
    )
