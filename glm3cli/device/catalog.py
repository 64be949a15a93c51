"""Descriptions of devices that needn't be here: the speeds and sizes that a plan is made with.

They are read from chips.toml beside this file, whose head explains every key, or from a user's own
file with the same keys (`--chip FILE.toml`).
"""

import functools
import re
import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from glm3cli.errors import ConfigError

_KINDS = ("npu", "cuda", "cpu")
_MAY_BE_ZERO = ("launch", "latency")
# Keys that only peaks.py reads; whoever copies a table of chips.toml may leave them in it.
_PEAK_KEYS = ("driver_names", "peak_dtypes", "fp32_tflops", "source")


@dataclass(frozen=True)
class Chip:
    """One kind of device; bandwidths are one way, in bytes/s.

    Attributes:
        name: The name that `--chip` takes.
        peak_tflops: Rate of dense matrix products in the type that is trained in, in TFLOP/s.
        memory_gib: Memory of one device, in GiB.
        memory_bandwidth: Bandwidth of that memory, in bytes/s.
        link_bandwidth: Bandwidth of one link to another device of the same server, in bytes/s.
        num_links: Number of such links that a device can use at the same time.
        network_bandwidth: Bandwidth from a device to another server, in bytes/s.
        kind: The kind of device as `--device` has it, which says whose kernels run.
        devices_per_server: Number of devices in one server.
        matrix_efficiency: Share of the peak that matrix products reach.
        attention_efficiency: Share of the peak that attention reaches.
        memory_efficiency: Share of the memory's bandwidth that other operators reach.
        link_efficiency: Share of a link's bandwidth that messages reach.
        launch: Seconds from the end of an operator to the start of the next one.
        latency: Seconds that a message without content takes.
    """

    name: str
    peak_tflops: float
    memory_gib: float
    memory_bandwidth: float
    link_bandwidth: float
    num_links: int
    network_bandwidth: float
    kind: str = "npu"
    devices_per_server: int = 8
    matrix_efficiency: float = 1.0
    attention_efficiency: float = 1.0
    memory_efficiency: float = 1.0
    link_efficiency: float = 1.0
    launch: float = 0.0
    latency: float = 0.0

    @property
    def memory_bytes(self) -> int:
        """The memory of one device, in bytes."""
        return int(self.memory_gib * 2**30)

    def bandwidth(self, num_ranks: int, extent: int) -> float:
        """Returns the bytes/s that each of `num_ranks` ranks sends in a collective, at best.

        Args:
            num_ranks: Number of ranks that take part.
            extent: Number of ranks from the first of them to the last, counting those in between:
                more than a server has devices means that the collective crosses the network.
        """
        if extent > self.devices_per_server:
            return self.network_bandwidth
        return self.link_bandwidth * min(num_ranks - 1, self.num_links)


def find_chip(name: str | None) -> Chip:
    """Returns the device that `--chip` names.

    Args:
        name: A name in chips.toml, in any case; a driver's name for the device, such as 910B3 in
            npu-smi's table; or the path of a .toml file that describes one device. None stands for
            the first device of chips.toml.

    Raises:
        ConfigError: No device has that name, or the file doesn't describe exactly one.
    """
    if name is not None and name.endswith(".toml"):
        return _of_file(Path(name))
    for chip in chips():
        if name is None or chip.name.lower() == name.lower():
            return chip
    found = chip_of_driver(f"{name}") or chip_of_driver(f"Ascend{name}")  # npu-smi leaves it out
    if found is not None:
        return found
    known = ", ".join(chip.name for chip in chips())
    raise ConfigError(
        f"--chip {name} is not known", f"use one of {known}, or a file that describes it (.toml)"
    )


def chip_of_driver(name: str) -> Chip | None:
    """Returns the device that a driver calls `name`, or None if it isn't described.

    As for the peak, the first table of chips.toml whose expression is found in the name counts.
    """
    for chip, table in tables().items():
        if "driver_names" in table and re.search(table["driver_names"], name):
            return find_chip(chip) if "memory_gib" in table else None
    return None


@functools.cache
def chips() -> tuple[Chip, ...]:
    """Returns the devices of chips.toml that can be planned for, in its order.

    Tables without a memory size hold a peak only (see peaks.py) and are left out.
    """
    described = {name: table for name, table in tables().items() if "memory_gib" in table}
    return tuple(_chip(name, table, "chips.toml") for name, table in described.items())


@functools.cache
def tables() -> dict[str, dict[str, Any]]:
    """Returns the tables of chips.toml as they stand there, by the name of the device."""
    text = resources.files("glm3cli.device").joinpath("chips.toml").read_text("utf-8")
    return _parse(text, "chips.toml")


def _of_file(file: Path) -> Chip:
    """Returns the one device that a user's file describes.

    Raises:
        ConfigError: The file can't be read or parsed, or doesn't describe exactly one device.
    """
    try:
        found = _parse(file.read_text("utf-8"), str(file))
    except OSError as error:
        raise ConfigError(f"--chip {file}: {error.strerror}", "give a file that exists") from error
    chips = [_chip(name, table, str(file)) for name, table in found.items()]
    if len(chips) != 1:
        raise ConfigError(f"--chip {file} describes {len(chips)} devices", "give a file with one")
    return chips[0]


def _parse(text: str, source: str) -> dict[str, Any]:
    """Parses TOML; `source` is the file's name for the error message.

    Raises:
        ConfigError: The text is no TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--chip {source} is no TOML: {error}", "mend it") from error


def _chip(name: str, table: Any, source: str) -> Chip:
    """Makes a `Chip` of a table; `source` is the file's name for error messages.

    Raises:
        ConfigError: A key is unknown, has a value that doesn't fit, or is missing.
    """
    known = [field.name for field in fields(Chip) if field.name != "name"]
    whole = table if isinstance(table, dict) else {}
    values = {key: value for key, value in whole.items() if key not in _PEAK_KEYS}
    wrong = [key for key, value in values.items() if key not in known or not _fits(key, value)]
    if wrong:
        raise ConfigError(
            f"--chip {source}: [{name}] has {', '.join(wrong)}, which is no key or has no fitting "
            "value",
            f"the keys are {', '.join(known)}",
        )
    try:
        return Chip(name, **values)
    except TypeError as error:
        raise ConfigError(
            f"--chip {source}: [{name}] is not complete: {error}", "see glm3cli/device/chips.toml"
        ) from error


def _fits(key: str, value: Any) -> bool:
    """Returns whether a key of a device's table can have this value."""
    if key == "kind":
        return value in _KINDS
    if not isinstance(value, int | float):
        return False
    return value > 0 or (value == 0 and key in _MAY_BE_ZERO)
