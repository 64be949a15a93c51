"""The collectives that glm3 uses, in every type, over all ranks and over pairs of them.

The numbers are whole, and their sums are just below the largest ones up to which a type has all
whole numbers: sums are exact in every order, and not in a type of fewer bits. What is received is
compared bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glm3cli.device import Device
from glm3cli.numerics.outcome import NAMES, ROUNDING, Outcome, attempt, distance

_TYPES = {**NAMES, torch.int32: "int32", torch.int64: "int64"}
# The largest sum of each type.
_LARGEST = {
    torch.bfloat16: 2**8,
    torch.float16: 2**11,
    torch.float32: 2**24,
    torch.int32: 2**31 - 1,
    torch.int64: 2**53,
}
# One number, an odd number of them, and more than a network sends at once.
_SIZES = (1, 1_001, 2**20 + 3)
_EXACT = "the bits that were sent"
_WITHOUT_MC2 = "leave --mc2 out, or --without-kernel mc2 sends and multiplies one after the other"
_STRIDE, _SHIFT = 1_000_000_007, 700_001
_WAY_OUT = "see that all ranks have the same versions, and `glm3 doctor` for the network's settings"


@dataclass(frozen=True)
class Group:
    """Ranks that exchange.

    Attributes:
        name: What the report says of them.
        ranks: Their numbers among all ranks.
        handle: The process group.
    """

    name: str
    ranks: Sequence[int]
    handle: Any


@dataclass(frozen=True)
class _Exchange:
    """One collective of one group on this rank.

    Attributes:
        group: The ranks that take part.
        rank: The place of this rank among them.
        size: The number of elements of a message.
        dtype: The type of the elements.
        device: The device of the messages.
    """

    group: Group
    rank: int
    size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def count(self) -> int:
        """The number of ranks."""
        return len(self.group.ranks)

    def of(self, rank: int, size: int | None = None) -> Tensor:
        """Returns the numbers that a rank of the group has, on the host.

        Args:
            rank: The place of the rank in the group.
            size: How many numbers; None for those of one message.
        """
        span = max(1, _LARGEST[self.dtype] // self.count)
        places = torch.arange(self.size if size is None else size)
        numbers = places * _STRIDE + rank * _SHIFT + 1
        return (numbers % (2 * span + 1) - span).to(self.dtype)

    def mine(self, size: int | None = None) -> Tensor:
        """Returns this rank's numbers on the device."""
        return self.of(self.rank, size).to(self.device)

    def whole(self, size: int | None = None) -> Tensor:
        """Returns the numbers of all ranks, [ranks, size]."""
        return torch.stack([self.of(rank, size) for rank in range(self.count)])

    def empty(self, *shape: int) -> Tensor:
        """Returns a tensor to receive into, filled with one number."""
        return torch.full(shape, 101, dtype=self.dtype, device=self.device)


# Returns what a collective has given this rank, and what is right.
_Collective = Callable[[_Exchange], tuple[Tensor, Tensor]]


def _sum(given: _Exchange) -> tuple[Tensor, Tensor]:
    ours = given.mine()
    dist.all_reduce(ours, group=given.group.handle)
    return ours, given.whole().sum(0, dtype=given.dtype)


def _maximum(given: _Exchange) -> tuple[Tensor, Tensor]:
    ours = given.mine()
    dist.all_reduce(ours, op=dist.ReduceOp.MAX, group=given.group.handle)
    return ours, given.whole().amax(0)


def _gather(given: _Exchange) -> tuple[Tensor, Tensor]:
    ours = given.empty(given.count * given.size)
    dist.all_gather_into_tensor(ours, given.mine(), group=given.group.handle)
    return ours, given.whole().flatten()


def _gather_list(given: _Exchange) -> tuple[Tensor, Tensor]:
    parts = [given.empty(given.size) for _ in range(given.count)]
    dist.all_gather(parts, given.mine(), group=given.group.handle)
    return torch.stack(parts), given.whole()


def _scatter(given: _Exchange) -> tuple[Tensor, Tensor]:
    whole = given.count * given.size
    ours = given.empty(given.size)
    dist.reduce_scatter_tensor(ours, given.mine(whole), group=given.group.handle)
    sums = given.whole(whole).sum(0, dtype=given.dtype)
    return ours, sums.view(given.count, -1)[given.rank]


def _exchange_all(given: _Exchange) -> tuple[Tensor, Tensor]:
    whole = given.count * given.size
    ours = given.empty(whole)
    dist.all_to_all_single(ours, given.mine(whole), group=given.group.handle)
    return ours, given.whole(whole).view(given.count, given.count, -1)[:, given.rank].flatten()


def _broadcast(given: _Exchange) -> tuple[Tensor, Tensor]:
    source = given.count - 1
    ours = given.mine()
    dist.broadcast(ours, given.group.ranks[source], group=given.group.handle)
    return ours, given.of(source)


def _ring(given: _Exchange) -> tuple[Tensor, Tensor]:
    """Sends to the next rank and receives from the one before, at the same time."""
    after, before = (given.rank + 1) % given.count, (given.rank - 1) % given.count
    ours = given.empty(given.size)
    handle, ranks = given.group.handle, given.group.ranks
    operations = [
        dist.P2POp(dist.isend, given.mine(), ranks[after], handle),
        dist.P2POp(dist.irecv, ours, ranks[before], handle),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return ours, given.of(before)


def _chain(given: _Exchange) -> tuple[Tensor, Tensor]:
    """Passes the numbers of the first rank on from rank to rank, as pipeline stages do."""
    handle, ranks = given.group.handle, given.group.ranks
    ours = given.mine() if given.rank == 0 else given.empty(given.size)
    if given.rank > 0:
        dist.recv(ours, ranks[given.rank - 1], group=handle)
    if given.rank < given.count - 1:
        dist.send(ours, ranks[given.rank + 1], group=handle)
    return ours, given.of(0)


_COLLECTIVES: dict[str, _Collective] = {
    "all_reduce, sum": _sum,
    "all_reduce, maximum": _maximum,
    "all_gather_into_tensor": _gather,
    "all_gather": _gather_list,
    "reduce_scatter_tensor": _scatter,
    "all_to_all_single": _exchange_all,
    "broadcast": _broadcast,
    "batch_isend_irecv": _ring,
    "send and recv": _chain,
}


def check_collectives(device: Device) -> Iterator[Outcome]:
    """Yields what each collective has given this rank; all ranks must call it.

    Args:
        device: The active device.
    """
    for group in _groups():
        rank = group.ranks.index(dist.get_rank())
        for name, collective in _COLLECTIVES.items():
            for dtype, size in ((dtype, size) for dtype in _TYPES for size in _SIZES):
                given = _Exchange(group, rank, size, dtype, device.torch_device())
                yield _compared(name, collective, given)
        yield _objects(group, rank)
        yield from _fused(group, rank, device)


def _groups() -> list[Group]:
    """Returns all ranks, and this rank's pair of neighbours where that is something else."""
    count, rank = dist.get_world_size(), dist.get_rank()
    everyone = Group(f"{count} ranks", range(count), dist.group.WORLD)
    if count < 4 or count % 2:
        return [everyone]
    pairs = [(first, first + 1) for first in range(0, count, 2)]
    handles = {pair: dist.new_group(pair) for pair in pairs}
    mine = pairs[rank // 2]
    return [everyone, Group("pairs", mine, handles[mine])]


def _compared(name: str, collective: _Collective, given: _Exchange) -> Outcome:
    """Runs a collective, and counts the elements that are wrong."""
    place = f"{given.group.name}, {given.size:,} numbers"
    outcome = partial(
        Outcome, name, _TYPES[given.dtype], limit=0.0, why=_EXACT, place=place, way_out=_WAY_OUT
    )
    found, trouble = attempt(lambda: collective(given))
    if found is None:
        return outcome(error=torch.inf, trouble=trouble)
    ours, right = found[0].to("cpu"), found[1]
    wrong = ours.shape != right.shape or int((ours != right).sum())
    return outcome(error=float(wrong))


def _objects(group: Group, rank: int) -> Outcome:
    """Checks the collectives of Python's objects."""
    gathered: list[Any] = [None] * len(group.ranks)
    dist.all_gather_object(gathered, {"rank": rank}, group=group.handle)
    holder = [rank]
    dist.broadcast_object_list(holder, group.ranks[0], group=group.handle)
    right = [{"rank": one} for one in range(len(group.ranks))]
    wrong = float(gathered != right) + float(holder != [0])
    return Outcome("objects", "", wrong, 0.0, _EXACT, group.name, _WAY_OUT)


def _fused(group: Group, rank: int, device: Device) -> Iterator[Outcome]:
    """Yields what the operators of --mc2 give, which multiply while they send."""
    if len(group.ranks) in (2, 4, 8):
        for dtype in (torch.bfloat16, torch.float16):
            for name, ours, right in _multiplied(group, rank, device, dtype):
                number = 4 * (1 + len(group.ranks))
                why = f"{number} roundings to {NAMES[dtype]}"
                error, limit = distance(ours, right), number * ROUNDING[dtype]
                yield Outcome(name, NAMES[dtype], error, limit, why, group.name, _WITHOUT_MC2)


def _multiplied(
    group: Group, rank: int, device: Device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields the name of each result of these operators, the result, and what is right."""
    count, inner, outer = len(group.ranks), 512, 64
    rows = [_whole(one, 32 * count, inner) for one in range(count)]
    matrices = [_whole(one + 50, inner, outer) for one in range(count)]
    mine = [one[rank].to(device.torch_device(), dtype) for one in (rows, matrices)]
    everyone = torch.cat(rows).double()
    product, gathered = device.kernels.gather_matmul(mine[0], mine[1], group.handle)
    yield "gather and multiply", product, everyone @ matrices[rank].double()
    yield "gather and multiply: the gathered", gathered, everyone
    sums = torch.stack(rows).double().bmm(torch.stack(matrices).double()).sum(0)
    scattered = device.kernels.matmul_scatter(mine[0], mine[1], group.handle)
    yield "multiply and scatter", scattered, sums.view(count, -1, outer)[rank]


def _whole(rank: int, rows: int, columns: int) -> Tensor:
    """Returns numbers from -1 to 1 that depend on the rank."""
    places = torch.arange(rows * columns).view(rows, columns)
    return ((places * 5 + places // columns * 3 + rank * 11) % 3 - 1).float()
