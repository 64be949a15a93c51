"""Graphs of an emulated NPU: what runs while one is captured is noted, and a replay runs it again.

Each operator runs again on the very tensors that it had, into the very tensors that it gave, with
the numbers that the host gave it then. So whatever the host computes in between is as good as
frozen, as it is in a graph of a card.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import ReferenceType, WeakSet, ref

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.npu.card import Card, Refused, tensors_in


class Pool:
    """The memory that graphs share; it is gone with the last of them."""

    def __init__(self) -> None:
        self.graphs: WeakSet[Graph] = WeakSet()
        self.was_used = False
        self.last: ReferenceType[Graph] | None = None


class Graph:
    """What was captured: operators, and the tensors that they have made."""

    card: Card

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self._fresh: list[torch.Tensor] = []
        self._pool: Pool | None = None

    def note(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        made = list(tensors_in(result))
        given = {one.untyped_storage()._cdata for one in tensors_in((args, kwargs))}
        self._calls.append((function, args, kwargs, made))
        self._fresh += [one for one in made if one.untyped_storage()._cdata not in given]

    def spoil(self) -> None:
        """Puts nonsense where the graph writes: it hasn't run yet, or another graph has."""
        for one in self._fresh:
            one.fill_(torch.nan if one.is_floating_point() else -1)

    def replay(self) -> None:
        assert self._pool is not None
        self.card.launches["replay"] += 1
        with _disable_current_modes():
            last = self._pool.last and self._pool.last()
            if last is not None and last is not self:
                last.spoil()
            self._pool.last = ref(self)
            for function, args, kwargs, made in self._calls:
                for old, new in zip(made, tensors_in(function(*args, **kwargs)), strict=True):
                    if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        old.copy_(new)

    @classmethod
    @contextmanager
    def capturing(
        cls, graph: "Graph", pool: Pool | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """Stands for `torch.npu.graph`."""
        assert pool is not None
        if pool.was_used and not pool.graphs:
            raise Refused("the pool is gone with its last graph")
        if capture_error_mode == "global":
            raise Refused("the thread that watches over HCCL would break the capture")
        cls.card.graph = graph
        try:
            yield
        finally:
            cls.card.graph = None
        pool.graphs.add(graph)
        pool.was_used, graph._pool = True, pool
        with _disable_current_modes():
            graph.spoil()


class _Stream:
    def wait_stream(self, other: "_Stream") -> None:
        pass


def give(npu: Any, card: Card) -> None:
    """Gives torch_npu's counterpart of torch.cuda what captures graphs."""
    Graph.card = card
    npu.NPUGraph, npu.graph, npu.graph_pool_handle = Graph, Graph.capturing, Pool
    npu.Stream = npu.current_stream = _Stream
    npu.stream = npu.device = lambda *_: nullcontext()
