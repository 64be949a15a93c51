"""`chip_file`: measured speeds as a file that `--chip` takes (see device/chips.toml)."""

import json
from pathlib import Path

from glm3cli.device import Device
from glm3cli.device.catalog import Chip
from glm3cli.errors import DeviceError
from glm3cli.host.environment import number_of
from glm3cli.numerics.speed import Speeds, trained_type
from glm3cli.version import __version__


def chip_file(file: Path, device: Device, num_ranks: int, speeds: Speeds) -> str:
    """Returns the content of a chip file, with the file's name as the name of the device.

    Args:
        file: The file.
        device: The device that was measured.
        num_ranks: The number of ranks.
        speeds: What was measured.
    """
    dtype = trained_type(device)
    peak = device.peak_tflops(dtype)
    tflops = peak or speeds.matrix / 1e12
    local = number_of("LOCAL_WORLD_SIZE", num_ranks)
    described = _described(device)
    values: dict[str, float | str | int] = {
        "kind": device.name,
        "peak_tflops": tflops,
        "matrix_efficiency": speeds.matrix / 1e12 / tflops,
        "attention_efficiency": speeds.attention / 1e12 / tflops,
        "memory_gib": device.memory() / 2**30,
        "memory_bandwidth": speeds.memory,
        "launch": speeds.launch,
        **_links(speeds, local, described),
    }
    why = [
        f"Measured by `glm3 doctor --numerics --chip-file` of glm3 {__version__} on {num_ranks} x "
        f"{device.chip()}, in {dtype}.",
        "peak_tflops is that of the data sheet."
        if peak
        else "peak_tflops is the rate of matrix products, as no peak is known.",
    ]
    if num_ranks == 1:
        why.append(
            "One rank has no links: those below are of "
            + (f"{described.name} in chips.toml." if described else "no meaning.")
            + " --nproc measures them."
        )
    elif not speeds.network:
        why.append("One server has no network: its bandwidth is taken to be that of a link.")
    lines = [f"# {line}" for line in why] + [f"[{json.dumps(file.stem)}]"]
    lines += [
        f"{key} = {json.dumps(value) if isinstance(value, str) else f'{value:.4g}'}"
        for key, value in values.items()
    ]
    return "\n".join(lines) + "\n"


def _described(device: Device) -> Chip | None:
    """Returns what chips.toml says about such devices; None if it has none."""
    try:
        return device.described(1)
    except DeviceError:
        return None


def _links(speeds: Speeds, local: int, described: Chip | None) -> dict[str, float | str | int]:
    """Returns the keys of the links.

    Args:
        speeds: What was measured.
        local: The number of ranks of this server.
        described: What chips.toml says about such devices.
    """
    if not speeds.link:
        return {
            "link_bandwidth": described.link_bandwidth if described else speeds.memory,
            "num_links": described.num_links if described else 1,
            "network_bandwidth": described.network_bandwidth if described else speeds.memory,
            "devices_per_server": described.devices_per_server if described else 1,
            "latency": described.latency if described else 0.0,
        }
    links = min(max(1, round(speeds.server / speeds.link)), max(1, local - 1))
    return {
        "link_bandwidth": speeds.link,
        "num_links": links,
        "network_bandwidth": speeds.network or speeds.link,
        "devices_per_server": local,
        "latency": speeds.latency,
    }
