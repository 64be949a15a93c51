"""Peak TFLOP/s of known devices, the denominator of model FLOPs utilisation (MFU).

The peaks are those of dense matrix products without sparsity; fp32 is without TF32, as torch
computes it by default. chips.toml has the numbers and their sources. A device that isn't there has
no peak: with a guess, every MFU would be a guess.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm3cli.device.catalog import tables

_16_BITS = ("bf16", "fp16")


@dataclass(frozen=True)
class Peak:
    """The peak of one device of chips.toml.

    Attributes:
        device: Regular expression that is found in the names by which drivers call the device.
        tflops: TFLOP/s by the name of the number type (`bf16`, `fp16`, `fp32`).
        source: Where the numbers are from.
    """

    device: str
    tflops: Mapping[str, float]
    source: str


def peak_tflops(device: str, dtype: str) -> float | None:
    """Returns the peak TFLOP/s of a device in a number type, or None where it isn't known.

    Args:
        device: The device's name as its driver has it, such as Ascend910B3.
        dtype: The number type, `bf16`, `fp16` or `fp32`.
    """
    for peak in known_peaks():
        if re.search(peak.device, device):
            return peak.tflops.get(dtype)
    return None


@functools.cache
def known_peaks() -> tuple[Peak, ...]:
    """Returns the peaks of chips.toml in its order, in which the first name that fits counts."""
    return tuple(_peak(table) for table in tables().values() if "driver_names" in table)


def _peak(table: Mapping[str, Any]) -> Peak:
    """Makes a peak of a device's table in chips.toml."""
    tflops = dict.fromkeys(table.get("peak_dtypes", _16_BITS), table["peak_tflops"])
    if "fp32_tflops" in table:
        tflops["fp32"] = table["fp32_tflops"]
    return Peak(table["driver_names"], tflops, table["source"])
