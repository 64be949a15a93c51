"""Predicts the time of an operator on a described device by the roofline model.

The time is the longer one of its operations at the peak and its bytes at the memory's bandwidth
(Williams et al. 2009, "Roofline"), each at the share that such operators reach, and the launch of
the operator on top.
"""

from dataclasses import dataclass

from glm3cli.device.catalog import Chip
from glm3cli.forecast.recorder import Operator

# How many times a collective sends the parts of all other ranks: an all-reduce is a scatter and a
# gather. Any other message is sent once as a whole.
_ROUNDS = {"allreduce": 2, "allgather": 1, "reduce_scatter": 1, "alltoall": 1}


@dataclass(frozen=True)
class Cost:
    """The predicted time of a call.

    Attributes:
        seconds: Time of the call, in seconds.
        bound: The part that takes longest: operations, memory, launch, link, or latency.
    """

    seconds: float
    bound: str


def cost(operator: Operator, chip: Chip) -> Cost:
    """Predicts the time that a call of an operator takes on a device."""
    if operator.kind == "message":
        return _message(operator, chip)
    share = chip.matrix_efficiency if operator.kind == "matrix" else chip.attention_efficiency
    operations = operator.flops / (chip.peak_tflops * 1e12 * share)
    memory = operator.bytes / (chip.memory_bandwidth * chip.memory_efficiency)
    slowest = max((operations, "operations"), (memory, "memory"), (chip.launch, "launch"))
    return Cost(max(operations, memory) + chip.launch, slowest[1])


def _message(operator: Operator, chip: Chip) -> Cost:
    """Predicts the time of a message; a group of one rank sends nothing."""
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
    """Returns the seconds of a message in which each rank sends `size` bytes.

    Args:
        size: Bytes that each rank sends.
        num_ranks: Number of ranks that take part.
        extent: Number of ranks from the first of them to the last (see `Chip.bandwidth`).
        chip: The device.
    """
    return chip.latency + size / (chip.bandwidth(num_ranks, extent) * chip.link_efficiency)
