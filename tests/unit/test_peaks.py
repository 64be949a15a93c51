"""The peaks that MFU is divided by, found by the names that drivers give to their devices."""

import pytest

from glm3cli.device import DEVICES, select
from glm3cli.device.catalog import chips
from glm3cli.device.peaks import known_peaks, peak_tflops


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("Ascend910B3", "bf16", 354),
        ("Ascend910B2C", "fp16", 354),
        ("Ascend910B4-1", "bf16", 354),
        ("Ascend910A", "fp16", 256),
        ("Ascend910ProA", "fp16", 256),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A800 80GB PCIe", "fp16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H20", "bf16", 148),
        ("NVIDIA A10", "bf16", 125),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
    ],
)
def test_known_devices(device, dtype, expected):
    assert peak_tflops(device, dtype) == expected


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("x86_64", "bf16"),
        ("Ascend910_9392", "bf16"),  # another chip, of which no source tells the peak
        ("Ascend910B", "fp16"),  # a first-generation name, too
        ("Ascend910A", "bf16"),  # has no bf16
        ("Ascend910B3", "fp32"),
        ("Tesla V100-SXM2-32GB", "bf16"),
        ("NVIDIA A1000", "bf16"),
        ("NVIDIA GeForce RTX 4090", "bf16"),
    ],
)
def test_what_is_not_known_has_no_peak(device, dtype):
    assert peak_tflops(device, dtype) is None


def test_every_row_says_where_its_numbers_are_from():
    assert len(known_peaks()) == 13
    assert all(len(row.source) > 10 and row.tflops for row in known_peaks())


def test_only_what_is_described_can_be_planned_for():
    assert [chip.name for chip in chips()] == ["910B", "910A", "A100", "H100", "CPU"]


def test_a_device_looks_its_chip_up(monkeypatch):
    gpu = DEVICES["cuda"]()
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-SXM4-40GB")
    assert (gpu.chip(), gpu.peak_tflops("bf16")) == ("NVIDIA A100-SXM4-40GB", 312)
    assert select("cpu").chip()
    assert select("cpu").peak_tflops("fp32") is None
