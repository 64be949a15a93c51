"""Builds shared libraries in place of CANN's, whose functions do nothing."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

# What torch_npu's libraries need, beside torch, Python, and the system (readelf -d).
_LIBRARIES = (
    "libascendcl.so",
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libfmk_parser.so",
    "libascend_protobuf.so",
    "libatb.so",
)
_LOOKED_UP = ("aclrtSetDeviceSatMode",)  # by name, at run time


def build(wheel: Path) -> list[Path]:
    """Builds them beside an unpacked torch_npu, and returns them; skips without a compiler."""
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} isn't installed: there are no stubs for CANN's libraries")
    folder = wheel / "stubs"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=wheel) as place:
            _compile(_missing(wheel), Path(place))
            target = Path(place).with_name(f"{Path(place).name}.done")
            Path(place).rename(target)
            Path(place).mkdir()
        try:
            target.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(target)
    return [folder / name for name in _LIBRARIES]


def _missing(wheel: Path) -> list[str]:
    """Returns the functions that torch_npu needs and no library here defines."""
    theirs = list((wheel / "torch_npu").rglob("*.so"))
    torchs = (Path(torch.__file__).parent / "lib").glob("*.so*")
    wanted = set().union(*(_symbols(path, "--undefined-only") for path in theirs))
    there = set().union(*(_symbols(path, "--defined-only") for path in [*theirs, *torchs]))
    system = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2")
    for name in system:
        found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True)
        path = Path(found.stdout.strip())
        there |= _symbols(path, "--defined-only") if path.is_file() else set()
    # Python's are there in a running interpreter; libatb's C++ is only called with an NPU.
    ours = re.compile(r"(?!_?Py|_ZT|.*atb)\w+")
    return sorted({name for name in wanted - there if ours.fullmatch(name)} | set(_LOOKED_UP))


def _symbols(path: Path, which: str) -> set[str]:
    listed = subprocess.run(["nm", "-D", which, str(path)], capture_output=True, text=True)
    return {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines() if line.split()}


def _compile(functions: list[str], folder: Path) -> None:
    source = folder / "stubs.c"
    source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in functions))
    for name in _LIBRARIES:
        subprocess.run(
            [
                *("gcc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{name}"),
                *("-o", str(folder / name)),
                *([str(source)] if name == _LIBRARIES[0] else ["-x", "c", "/dev/null"]),
            ],
            check=True,
            capture_output=True,
        )
