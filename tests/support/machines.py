"""Made-up machines: folders and environment variables that look like an Ascend server."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from glm3cli.device.doctor.machine import Machine

# What glm3 needs anywhere, and what NPUs need beside it.
LIBRARIES = dict.fromkeys(
    ("sentencepiece", "safetensors", "pyarrow", "pydantic", "typer", "rich"), "1.0"
)
PACKAGES = {
    **LIBRARIES,
    "torch": "2.7.1+cpu",
    "torch_npu": "2.7.1.post4",
    "megatron-core": "0.16.1",
    "mindspeed": "0.16.0",
    "triton-ascend": "3.2.0",
    "einops": "0.8.1",
    "protobuf": "6.33.0",
    "pybind11": "3.0.1",
}
USER, GROUP = 1000, 2000


class FakeMachine(Machine):
    """A machine whose files lie in a folder, and whose /dev/shm is as large as wanted."""

    shared_memory = 2**34

    def free(self, folder: Path) -> int:
        return self.shared_memory


def laptop(folder: Path) -> FakeMachine:
    """Makes a machine without NPUs on which glm3 runs."""
    machine = FakeMachine(
        root=folder / "root",
        environment={"PATH": str(folder / "bin")},
        packages=[str(folder / "packages")],
        python="3.11.9",
        architecture="aarch64",
        uid=USER,
        groups=frozenset({GROUP}),
    )
    for name, version in {**LIBRARIES, "torch": "2.13.0+cpu", "megatron-core": "0.16.1"}.items():
        install(machine, name, version)
    return machine


def server(folder: Path, num_cards: int = 8) -> FakeMachine:
    """Makes a server with NPUs on which everything fits."""
    machine = laptop(folder)
    for name, version in PACKAGES.items():
        install(machine, name, version)
    write(machine.file("/usr/local/Ascend/driver/version.info"), "Version=25.5.1\npackage=x\n")
    machine = set_cann(machine, "9.0.0")
    for name in ("davinci_manager", "devmm_svm", "hisi_hdc", *map(card, range(num_cards))):
        write(machine.file(f"/dev/{name}"), "")
        machine.file(f"/dev/{name}").chmod(0o666)
    for name in ("lo", "eth0", "enp67s0f5"):
        machine.file(f"/sys/class/net/{name}").mkdir(parents=True)
    for program in ("npu-smi", "bisheng", "g++"):
        write(folder / "bin" / program, "#!/bin/sh\n").chmod(0o755)
    for number in range(num_cards):
        set_pci(machine, number, "0xd802")
    return with_environment(machine, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def set_pci(machine: Machine, number: int, device: str) -> None:
    """Makes an NPU one of a kind, by its id on the PCI bus."""
    place = machine.file(f"/sys/bus/pci/devices/0000:{number:02x}:00.0")
    write(place / "vendor", "0x19e5\n")
    write(place / "device", f"{device}\n")


def card(number: int) -> str:
    """Returns the name of an NPU's device file."""
    return f"davinci{number}"


def install(machine: Machine, package: str, version: str | None, **origin: object) -> Path:
    """Writes a package's metadata in place of any that is there; without a version, removes it."""
    name = package.replace("-", "_")
    folder = Path(machine.packages[0])
    for old in folder.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    if version is None:
        return folder
    record = folder / f"{name}-{version}.dist-info"
    write(record / "METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    if origin:
        write(record / "direct_url.json", json.dumps(origin))
    return record


def set_cann(machine: FakeMachine, version: str) -> FakeMachine:
    """Installs CANN 9 or newer, and sets its environment."""
    home = machine.file("/usr/local/Ascend/cann")
    record = f"package_name=Ascend-cann-toolkit\nversion={version}\narch=aarch64\n"
    write(home / "aarch64-linux/ascend_toolkit_install.info", record)
    write(home / "set_env.sh", "")
    write(home / "include/acl/acl.h", "")
    return with_environment(machine, ASCEND_HOME_PATH=str(home))


def with_environment(machine: FakeMachine, **variables: str) -> FakeMachine:
    """Returns the same machine with other values of some variables."""
    return replace(machine, environment={**machine.environment, **variables})


def without(machine: FakeMachine, *variables: str) -> FakeMachine:
    """Returns the same machine without some variables."""
    kept = {name: value for name, value in machine.environment.items() if name not in variables}
    return replace(machine, environment=kept)


def write(path: Path, text: str) -> Path:
    """Writes a file and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
