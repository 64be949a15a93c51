"""How long an operator takes on a described device: what bounds it, and what comes on top.

Williams et al. 2009, "Roofline": the longer one of its operations at the peak and its bytes at the
memory's bandwidth, each at the share that such operators reach.
"""

from dataclasses import dataclass

from glm3cli.device.catalog import Chip
from glm3cli.forecast.recorder import Operator

# Times that each rank sends its share of the others' parts: a reduction for all is a scatter and a
# gather. What is not named is sent once and whole.
_ROUNDS = {"allreduce": 2, "allgather": 1, "reduce_scatter": 1, "alltoall": 1}


@dataclass(frozen=True)
class Cost:
    """Seconds of a call.

    Attributes:
        bound: What it waits for: operations, memory, launch, link, or latency.
    """

    seconds: float
    bound: str


def cost(operator: Operator, chip: Chip) -> Cost:
    """How long an operator takes."""
    if operator.kind == "message":
        return _message(operator, chip)
    share = chip.matrix_efficiency if operator.kind == "matrix" else chip.attention_efficiency
    operations = operator.flops / (chip.peak_tflops * 1e12 * share)
    memory = operator.bytes / (chip.memory_bandwidth * chip.memory_efficiency)
    slowest = max((operations, "operations"), (memory, "memory"), (chip.launch, "launch"))
    return Cost(max(operations, memory) + chip.launch, slowest[1])


def _message(operator: Operator, chip: Chip) -> Cost:
    ranks = len(operator.ranks)
    if ranks == 1:
        return Cost(chip.launch, "launch")
    name = operator.name.partition(".")[2].lstrip("_")
    rounds = next((times for start, times in _ROUNDS.items() if name.startswith(start)), None)
    sent = operator.bytes * (1 if rounds is None else rounds * (ranks - 1) / ranks)
    extent = operator.ranks[-1] - operator.ranks[0] + 1
    seconds = send_seconds(sent, ranks, extent, chip)
    return Cost(seconds, "link" if seconds > 2 * chip.latency else "latency")


def send_seconds(size: float, num_ranks: int, extent: int, chip: Chip) -> float:
    """Seconds of a message of `size` bytes from each rank; see `Chip.bandwidth`."""
    return chip.latency + size / (chip.bandwidth(num_ranks, extent) * chip.link_efficiency)
