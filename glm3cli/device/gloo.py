"""All-gather and reduce-scatter of single tensors over gloo, as a direct exchange between ranks.

torch 2.13's backend (ProcessGroupGloo.cpp) does a reduce-scatter as an all-reduce of a copy, and
gathers through copies of everything. Here each rank sends every other rank what that one needs, and
adds what it receives in the order of ranks. Between two ranks on one machine this is two to three
times as fast. `EXCHANGES` are the redirects that put it in the place of gloo's own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glm3cli.device.redirects import Redirect

_WHY = "distributed/param_and_grad_buffer.py, tensor_parallel/layers.py: what gloo does slowly"
_TAG = 2**20  # no sender of single messages uses this tag


class _Exchange:
    """Messages that are under way, with the interface of torch.distributed's `Work`.

    Args:
        messages: The sends and receives that were begun.
        finish: Called once, when all of them are done.
        kept: The tensors that are sent, which must live until then.
    """

    def __init__(self, messages: list[Any], finish: Callable[[], None], kept: Any) -> None:
        self._messages, self._finish, self._kept = messages, finish, kept

    def wait(self, _timeout: Any = None) -> bool:
        """Waits until the result is there; a second call does nothing."""
        messages, self._messages = self._messages, []
        for message in messages:
            message.wait()
        if messages:
            self._finish()
            self._kept = None
        return True


def _all_gather(group: Any, outputs: list[Tensor], inputs: list[Tensor]) -> _Exchange:
    """Begins an all-gather: each output becomes all ranks' inputs, one after the other."""
    rank, messages = group.rank(), []
    parts = [part.reshape(-1) for part in inputs]
    for whole, own in zip(outputs, parts, strict=True):
        places = whole.view(-1).chunk(group.size())
        if places[rank].data_ptr() != own.data_ptr():
            places[rank].copy_(own)
        messages += _send_and_receive(group, [own] * group.size(), places)
    return _Exchange(messages, lambda: None, parts)


def _reduce_scatter(group: Any, outputs: list[Tensor], inputs: list[Tensor]) -> _Exchange:
    """Begins a reduce-scatter: each output becomes the sum of this rank's part of all inputs."""
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
    """Begins the messages to and from every other rank of the group.

    Args:
        group: The process group.
        sent: The tensor for each rank of the group.
        places: Where the tensor from each rank is received.
    """
    size, rank = group.size(), group.rank()
    messages = []
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        messages.append(group.recv([places[source]], source, _TAG))
        messages.append(group.send([sent[to]], to, _TAG))
    return messages


def _sum(parts: list[Tensor], output: Tensor, rank: int) -> None:
    """Adds the ranks' parts in the order of ranks and writes the sum into `output`.

    The output may share memory with this rank's own part, so intermediate sums are written into the
    first part that was received.
    """
    total, *rest, last = parts
    received = parts[0 if rank != 0 else 1]
    for part in rest:
        total = torch.add(total, part, out=received)
    torch.add(total, last, out=output)


def _gathers(original: Any) -> Any:
    """Replaces a gathering method of ProcessGroup where the group is gloo's."""

    def gather(group: Any, output: Any, parts: Any, options: Any = None) -> Any:
        if not _is_ours(group):
            return original(group, output, parts, *_given(options))
        return _all_gather(group, _listed(output), _listed(parts))

    return gather


def _scatters(original: Any) -> Any:
    """Replaces a reduce-scatter method of ProcessGroup where the group is gloo's and sums."""

    def scatter(group: Any, output: Any, whole: Any, options: Any = None) -> Any:
        if not _is_ours(group) or (options and options.reduceOp != dist.ReduceOp.SUM):
            return original(group, output, whole, *_given(options))
        return _reduce_scatter(group, _listed(output), _listed(whole))

    return scatter


def _is_ours(group: Any) -> bool:
    """Returns whether a group has several ranks and gloo as backend."""
    return group.size() > 1 and dist.get_backend(group) == "gloo"


def _listed(tensors: Any) -> list[Tensor]:
    """Returns a tensor, or several, as a list."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _given(options: Any) -> list[Any]:
    """Returns the options as the arguments that pass them on, if there are any."""
    return [] if options is None else [options]


def _rows(names: tuple[str, ...], replace: Callable[[Any], Any]) -> list[Redirect]:
    """Makes a redirect for each of these names that this version of torch has.

    torch 2.13 has new names beside the old ones. If none of them exists, the first is listed all
    the same, so that applying the table fails with its name.
    """
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
