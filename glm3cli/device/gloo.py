"""Gloo's gather and reduce-scatter of single tensors, as a direct exchange between the ranks.

torch 2.13's backend (ProcessGroupGloo.cpp) makes a reduce-scatter of an all-reduce of a copy, and
gathers through copies of everything. Here each rank sends every other what that one wants, and adds
what it gets in the order of ranks: between two ranks on one machine, two to three times as fast.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glm3cli.device.redirects import Redirect

_WHY = "distributed/param_and_grad_buffer.py, tensor_parallel/layers.py: what gloo does slowly"
_TAG = 2**20  # that no sender of single messages takes


class _Exchange:
    """Messages that are under way; stands for torch.distributed's `Work`.

    Args:
        finish: What is to be done with them when all are here.
        kept: What they are sent from.
    """

    def __init__(self, messages: list[Any], finish: Callable[[], None], kept: Any) -> None:
        self._messages, self._finish, self._kept = messages, finish, kept

    def wait(self, _timeout: Any = None) -> bool:
        """Waits for the result; a second call does nothing."""
        messages, self._messages = self._messages, []
        for message in messages:
            message.wait()
        if messages:
            self._finish()
            self._kept = None
        return True


def _all_gather(group: Any, outputs: list[Tensor], inputs: list[Tensor]) -> _Exchange:
    """Each output becomes all ranks' inputs one after the other."""
    rank, messages = group.rank(), []
    parts = [part.reshape(-1) for part in inputs]
    for whole, own in zip(outputs, parts, strict=True):
        places = whole.view(-1).chunk(group.size())
        if places[rank].data_ptr() != own.data_ptr():
            places[rank].copy_(own)
        messages += _send_and_receive(group, [own] * group.size(), places)
    return _Exchange(messages, lambda: None, parts)


def _reduce_scatter(group: Any, outputs: list[Tensor], inputs: list[Tensor]) -> _Exchange:
    """Each output becomes the sum of this rank's part of all ranks' inputs."""
    messages, sums = [], []
    for output, whole in zip(outputs, inputs, strict=True):
        own, shares = group.rank(), whole.reshape(-1).chunk(group.size())
        parts = [x if rank == own else torch.empty_like(x) for rank, x in enumerate(shares)]
        messages += _send_and_receive(group, shares, parts)
        sums.append((output.view(-1), parts))

    def add() -> None:
        for output, parts in sums:
            _sum(parts, output, group.rank())

    return _Exchange(messages, add, inputs)


def _send_and_receive(group: Any, sent: Sequence[Tensor], places: Sequence[Tensor]) -> list[Any]:
    """Begins the messages to and from every other rank of the group."""
    size, rank = group.size(), group.rank()
    messages = []
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        messages.append(group.recv([places[source]], source, _TAG))
        messages.append(group.send([sent[to]], to, _TAG))
    return messages


def _sum(parts: list[Tensor], output: Tensor, rank: int) -> None:
    """Adds in the order of ranks; the output may be where this rank's own part is."""
    total, *rest, last = parts
    received = parts[0 if rank != 0 else 1]
    for part in rest:
        total = torch.add(total, part, out=received)
    torch.add(total, last, out=output)


def _gathers(original: Any) -> Any:
    def gather(group: Any, output: Any, parts: Any, options: Any = None) -> Any:
        if not _is_ours(group):
            return original(group, output, parts, *_given(options))
        return _all_gather(group, _listed(output), _listed(parts))

    return gather


def _scatters(original: Any) -> Any:
    def scatter(group: Any, output: Any, whole: Any, options: Any = None) -> Any:
        if not _is_ours(group) or (options and options.reduceOp != dist.ReduceOp.SUM):
            return original(group, output, whole, *_given(options))
        return _reduce_scatter(group, _listed(output), _listed(whole))

    return scatter


def _is_ours(group: Any) -> bool:
    return group.size() > 1 and dist.get_backend(group) == "gloo"


def _listed(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _given(options: Any) -> list[Any]:
    return [] if options is None else [options]


def _rows(names: tuple[str, ...], replace: Callable[[Any], Any]) -> list[Redirect]:
    # torch 2.13 has new names beside the old ones. With none of them the first is missed aloud.
    here = [name for name in names if hasattr(dist.ProcessGroup, name)] or names[:1]
    return [Redirect("torch.distributed.ProcessGroup", name, replace, _WHY) for name in here]


EXCHANGES = (
    *_rows(
        (
            "_allgather_base",
            "allgather_into_tensor_coalesced",
            "all_gather_single",
            "all_gather_single_coalesced",
        ),
        _gathers,
    ),
    *_rows(
        (
            "_reduce_scatter_base",
            "reduce_scatter_tensor_coalesced",
            "reduce_scatter_single",
            "reduce_scatter_single_coalesced",
        ),
        _scatters,
    ),
)
