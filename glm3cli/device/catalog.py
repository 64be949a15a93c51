"""What a plan is made with: speeds and sizes of devices that needn't be here.

They are in chips.toml beside this file, each with its sources, and in files of one's own.
"""

import functools
import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from glm3cli.errors import ConfigError

_KINDS = ("npu", "cuda", "cpu")
_MAY_BE_ZERO = ("launch", "latency")


@dataclass(frozen=True)
class Chip:
    """One kind of device; bandwidths in bytes/s and one way, times in seconds.

    Attributes:
        peak_tflops: TFLOP/s of dense matrix products in the type that is trained in.
        memory_gib: Of one device.
        link_bandwidth: From a device to another one of the same server.
        num_links: Such links that a device can use at the same time.
        network_bandwidth: From a device to another server.
        kind: As `--device` has it: whose kernels run.
        matrix_efficiency: Share of the peak that matrix products reach.
        attention_efficiency: Share of the peak that attention reaches.
        memory_efficiency: Share of the memory's bandwidth that other operators reach.
        link_efficiency: Share of a link's bandwidth that messages reach.
        launch: From the end of an operator to the start of the next.
        latency: Of a message without content.
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
        """Of one device."""
        return int(self.memory_gib * 2**30)

    def bandwidth(self, num_ranks: int, extent: int) -> float:
        """Bytes/s that each of `num_ranks` sends in a collective of theirs, at best.

        Args:
            num_ranks: Ranks that take part.
            extent: Ranks from the first of them to the last, as they are numbered.
        """
        if extent > self.devices_per_server:
            return self.network_bandwidth
        return self.link_bandwidth * min(num_ranks - 1, self.num_links)


def find_chip(name: str | None) -> Chip:
    """The chip of that name, or in the file of that name; without one, the first of ours.

    Raises:
        ConfigError: There is none, or the file doesn't describe one.
    """
    if name is not None and name.endswith(".toml"):
        return _of_file(Path(name))
    for chip in chips():
        if name is None or chip.name.lower() == name.lower():
            return chip
    known = ", ".join(chip.name for chip in chips())
    raise ConfigError(
        f"--chip {name} is not known", f"use one of {known}, or a file that describes it (.toml)"
    )


@functools.cache
def chips() -> tuple[Chip, ...]:
    """Those of chips.toml, in its order."""
    text = resources.files("glm3cli.device").joinpath("chips.toml").read_text("utf-8")
    return _parse(text, "chips.toml")


def _of_file(file: Path) -> Chip:
    try:
        found = _parse(file.read_text("utf-8"), str(file))
    except OSError as error:
        raise ConfigError(f"--chip {file}: {error.strerror}", "give a file that exists") from error
    if len(found) != 1:
        raise ConfigError(f"--chip {file} describes {len(found)} devices", "give a file with one")
    return found[0]


def _parse(text: str, source: str) -> tuple[Chip, ...]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--chip {source} is no TOML: {error}", "mend it") from error
    return tuple(_chip(name, table, source) for name, table in tables.items())


def _chip(name: str, table: Any, source: str) -> Chip:
    known = [field.name for field in fields(Chip) if field.name != "name"]
    values = table if isinstance(table, dict) else {}
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
    if key == "kind":
        return value in _KINDS
    if not isinstance(value, int | float):
        return False
    return value > 0 or (value == 0 and key in _MAY_BE_ZERO)
