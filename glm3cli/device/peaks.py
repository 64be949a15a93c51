"""Peak TFLOP/s of known devices, the denominator of model FLOPs utilisation (MFU).

Dense matrix products without sparsity. fp32 is without TF32, as torch computes it by default.
What isn't in the table has no peak here: a guess would make every MFU a guess.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """One row: a pattern of the driver's device names, and TFLOP/s by dtype.

    Attributes:
        source: Where the numbers are from.
    """

    device: str
    tflops: Mapping[str, float]
    source: str


def _rates(half: float, fp32: float) -> Mapping[str, float]:
    return {"bf16": half, "fp16": half, "fp32": fp32}


# The first row that matches counts: the special names come before the general ones.
PEAKS = (
    Peak(
        r"Ascend910B\d",
        {"bf16": 354.0, "fp16": 354.0},
        "24 cores x 8,192 operations x 1.8 GHz (910B2); the denominator of MindSpeed-LLM and verl "
        "for every 910B; --peak-tflops for yours",
    ),
    Peak(r"Ascend910(Pro|Premium)?A\b", {"fp16": 256.0}, "Huawei's launch of the Ascend 910, 2019"),
    Peak(r"\bH100 NVL\b", _rates(835.0, 60.0), "NVIDIA H100 data sheet"),
    Peak(r"\bH100 PCIe\b", _rates(756.0, 51.0), "NVIDIA H100 data sheet"),
    Peak(r"\bH[128]00\b", _rates(989.4, 66.9), "NVIDIA H100 and H200 data sheets"),
    Peak(r"\bH20\b", _rates(148.0, 44.0), "NVIDIA H20 data sheet"),
    Peak(r"\bA[18]00\b", _rates(312.0, 19.5), "NVIDIA A100 data sheet"),
    Peak(r"\bA40\b", _rates(149.7, 37.4), "NVIDIA A40 data sheet"),
    Peak(r"\bA10\b", _rates(125.0, 31.2), "NVIDIA A10 data sheet"),
    Peak(r"\bL40S\b", _rates(362.0, 91.6), "NVIDIA L40S data sheet"),
    Peak(r"\bV100-SXM", {"fp16": 125.0, "fp32": 15.7}, "NVIDIA V100 data sheet"),
    Peak(r"\bV100-PCIE", {"fp16": 112.0, "fp32": 14.0}, "NVIDIA V100 data sheet"),
    Peak(r"\bT4\b", {"fp16": 65.0, "fp32": 8.1}, "NVIDIA T4 data sheet"),
)


def peak_tflops(device: str, dtype: str) -> float | None:
    """Peak TFLOP/s of a device by its driver's name, or None where it isn't known."""
    for row in PEAKS:
        if re.search(row.device, device):
            return row.tflops.get(dtype)
    return None
