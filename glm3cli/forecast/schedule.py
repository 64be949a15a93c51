"""When a pipeline's stages work and when they wait, from the schedules of megatron-core.

1F1B and its interleaved form (Narayanan et al. 2021, "Efficient large-scale language model training
on GPU clusters"), as schedules.py of megatron-core 0.16.1 orders the passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Pass(NamedTuple):
    """A micro-batch's way through a chunk of a stage."""

    is_forward: bool
    chunk: int
    microbatch: int


@dataclass(frozen=True)
class StagePace:
    """Seconds of a micro-batch in each chunk of a stage.

    Attributes:
        send: Of a message to the next or the previous stage.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    send: float = 0.0


def passes(pp_rank: int, pp: int, vpp: int, num_microbatches: int) -> list[Pass]:
    """What a stage does, in its order: a warm-up, then one forward and one backward in turn."""
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
    """Chunk and micro-batch: pp micro-batches go through a chunk, then through the next one."""
    group, rest = divmod(index, pp * vpp)
    if vpp == 1:
        return 0, index
    return rest // pp, group * pp + rest % pp


def span(paces: Sequence[StagePace], num_microbatches: int) -> float:
    """Seconds from the first pass of any stage to the end of the last one.

    A stage sends when a pass is over. It goes on meanwhile where it has several chunks
    (overlap_p2p_comm), and else waits until the message has gone.
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
    """The stage and the pass that bring what a pass begins with; None for the data."""
    step = -1 if one.is_forward else 1
    before, chunk = rank + step, one.chunk
    if not 0 <= before < pp:
        before, chunk = before % pp, chunk + step
    if 0 <= chunk < vpp:
        return before, one._replace(chunk=chunk)
    return None if one.is_forward else (rank, one._replace(is_forward=True))
