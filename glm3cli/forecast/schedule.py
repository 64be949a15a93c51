"""Computes when the stages of a pipeline work and wait, by the schedules of megatron-core.

These are 1F1B and its interleaved form (Narayanan et al. 2021, "Efficient large-scale language
model training on GPU clusters"), with the order of passes of megatron-core 0.16.1 (schedules.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Pass(NamedTuple):
    """One pass of a micro-batch through a chunk of a stage.

    Attributes:
        is_forward: Whether it is the forward pass; else it is the backward pass.
        chunk: The chunk's index in the stage.
        microbatch: The micro-batch's index in the step.
    """

    is_forward: bool
    chunk: int
    microbatch: int


@dataclass(frozen=True)
class StagePace:
    """The times of a micro-batch in one stage, in seconds.

    Attributes:
        forward: Seconds of the forward pass in each chunk.
        backward: Seconds of the backward pass in each chunk.
        send: Seconds of a message to the next or the previous stage.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    send: float = 0.0


def passes(pp_rank: int, pp: int, vpp: int, num_microbatches: int) -> list[Pass]:
    """Returns the passes of a stage in their order.

    It begins with forward passes (the warm-up), then does one forward and one backward pass in
    turn, and ends with backward passes.

    Args:
        pp_rank: The stage's rank in the pipeline.
        pp: Number of stages.
        vpp: Number of chunks of each stage.
        num_microbatches: Number of micro-batches of a step.
    """
    total = num_microbatches * vpp
    after = pp - pp_rank - 1
    warm_up = min(after if vpp == 1 else 2 * after + (vpp - 1) * pp, total)
    forth = [_nth(index, pp, vpp) for index in range(total)]
    back = [(vpp - 1 - chunk, microbatch) for chunk, microbatch in forth]
    order = [Pass(True, *one) for one in forth[:warm_up]]
    for index in range(total - warm_up):
        order += [Pass(True, *forth[warm_up + index]), Pass(False, *back[index])]
    return order + [Pass(False, *one) for one in back[total - warm_up :]]


def _nth(index: int, pp: int, vpp: int) -> tuple[int, int]:
    """Returns the chunk and the micro-batch of the forward pass with this index.

    pp micro-batches go through a chunk, then through the next one.
    """
    group, rest = divmod(index, pp * vpp)
    if vpp == 1:
        return 0, index
    return rest // pp, group * pp + rest % pp


def span(paces: Sequence[StagePace], num_microbatches: int) -> float:
    """Returns the seconds from the first pass of any stage to the end of the last one.

    A stage sends its result when a pass is over. With several chunks it goes on meanwhile
    (megatron-core's overlap_p2p_comm); with one it waits until the message has gone.

    Args:
        paces: The times of the stages, in their order.
        num_microbatches: Number of micro-batches of a step.
    """
    pp, vpp = len(paces), len(paces[0].forward)
    orders = [passes(rank, pp, vpp, num_microbatches) for rank in range(pp)]
    clocks, places = [0.0] * pp, [0] * pp
    arrived: dict[tuple[int, Pass], float] = {}
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        before = sum(places)
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                one = order[places[rank]]
                source = _source(rank, one, pp, vpp)
                if source is not None and source not in arrived:
                    break
                start = max(clocks[rank], 0.0 if source is None else arrived[source])
                pace = paces[rank]
                end = start + (pace.forward if one.is_forward else pace.backward)[one.chunk]
                arrived[rank, one] = end + pace.send
                clocks[rank] = end + (pace.send if vpp == 1 else 0.0)
                places[rank] += 1
        assert sum(places) > before, "the schedule waits for itself"
    return max(clocks)


def _source(rank: int, one: Pass, pp: int, vpp: int) -> tuple[int, Pass] | None:
    """Returns the stage and the pass whose result a pass needs; None if it reads the data."""
    step = -1 if one.is_forward else 1
    before, chunk = rank + step, one.chunk
    if not 0 <= before < pp:
        before, chunk = before % pp, chunk + step
    if 0 <= chunk < vpp:
        return before, one._replace(chunk=chunk)
    return None if one.is_forward else (rank, one._replace(is_forward=True))
