"""What a plan is made with: speeds and sizes of devices that needn't be here.

Peaks are of dense 16-bit matrix products. Bandwidths are one way. Published numbers, not measured.
"""

from dataclasses import dataclass

from glm3cli.errors import ConfigError


@dataclass(frozen=True)
class Chip:
    """One kind of device, in servers of eight.

    Attributes:
        peak_tflops: 16-bit TFLOP/s.
        memory_bytes: Of one device.
        memory_bandwidth: Bytes/s.
        link_bandwidth: Bytes/s from a device to another one of the same server.
        num_links: Such links that a device can use at the same time.
        network_bandwidth: Bytes/s from a device to another server.
    """

    name: str
    peak_tflops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    num_links: int
    network_bandwidth: float
    devices_per_server: int = 8

    def bandwidth(self, num_ranks: int, extent: int) -> float:
        """Bytes/s that each of `num_ranks` sends in a collective of theirs.

        Args:
            num_ranks: Ranks that take part.
            extent: Ranks from the first of them to the last, as they are numbered.
        """
        if extent > self.devices_per_server:
            return self.network_bandwidth
        return self.link_bandwidth * min(num_ranks - 1, self.num_links)


CHIPS = (
    # 354 TFLOP/s: the denominator of MindSpeed-LLM (utils/flops) and verl (flops_counter.py).
    # 64 GB, 1.6 TB/s; HCCS joins every two of eight: 392 GB/s both ways over seven links; 200 Gb/s
    # RoCE per device (public data of Atlas 800T A2).
    Chip("910B", 354.0, 64 * 1024**3, 1.6e12, 28e9, 7, 25e9),
    # NVIDIA's data sheets; NVSwitch gives the whole bandwidth to any peer; 200 and 400 Gb/s
    # InfiniBand per device, as in DGX.
    Chip("A100", 312.0, 80 * 1024**3, 2.0e12, 300e9, 1, 25e9),
    Chip("H100", 989.4, 80 * 1024**3, 3.35e12, 450e9, 1, 50e9),
)


def find_chip(name: str | None) -> Chip:
    """The chip of that name; without one, the first of the table.

    Raises:
        ConfigError: There is none.
    """
    for chip in CHIPS:
        if name is None or chip.name.lower() == name.lower():
            return chip
    known = ", ".join(chip.name for chip in CHIPS)
    raise ConfigError(f"--chip {name} is not known", f"use one of {known}")
