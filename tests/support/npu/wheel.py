"""Gets torch_npu's wheel from the package registry and unpacks it into a folder of its own.

It isn't installed: `import torch` would then load it, and fail without CANN.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

from glm3cli.device.doctor.pins import ALSO, ASCEND


def version_here() -> str:
    """Returns the version of torch_npu for the torch that is installed."""
    torch_version = torch.__version__.split("+")[0]
    pinned = {pins["torch"]: pins["torch_npu"] for pins in (ASCEND, ALSO)}
    return pinned.get(torch_version, torch_version)


def unpacked(version: str, cache: Path) -> Path:
    """Returns the folder of torch_npu `version`, fetched once; skips the test if that fails."""
    folder = cache / version
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as place:
        got = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
                *("--disable-pip-version-check", "--dest", place, f"torch-npu=={version}"),
            ],
            capture_output=True,
            text=True,
        )
        if got.returncode:
            reason = got.stderr.strip().splitlines()[-1]
            pytest.skip(f"the wheel torch-npu=={version} can't be had: {reason}")
        [wheel] = Path(place).glob("*.whl")
        target = Path(place) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
        try:
            target.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(target)
    return folder


def schemas(folder: Path) -> dict[str, str]:
    """Returns the schemas of a wheel's operators by name, read from the text in its library."""
    text = (folder / "torch_npu/lib/libtorch_npu.so").read_bytes()
    found = re.findall(rb"(?<=\0)(npu_\w+)(\([\x20-\x7e]*\) -> [\x20-\x7e]+)(?=\0)", text)
    return {name.decode(): (name + rest).decode() for name, rest in found}
