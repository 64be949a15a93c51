"""Values that a first rank gives to other ranks, which wait for them as long as it takes.

A collective that waits for a person would run into the time limit of its process group, so such
values go through the store that the ranks share. While all ranks work anyway, `Orders.share` is
faster.
"""

import contextlib
import pickle
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from glm3cli.device import require_active
from glm3cli.parallel.groups import Grid

_PATIENCE = timedelta(seconds=60)  # of one look into the store, after which comes another


class Orders:
    """A way from a first rank to others; each of them has one, made at the same time."""

    def __init__(self, grid: Grid, *, of_copy: bool = False) -> None:
        """Makes this rank's end of the way.

        Args:
            grid: This rank's place.
            of_copy: Whether the ranks are those of each copy of the model, which don't wait for the
                other copies; if not, they are all ranks.
        """
        self._group = grid.copy_group if of_copy else None
        self._first = dist.get_global_rank(grid.copy_group, 0) if of_copy else 0
        self._num_others = dist.get_world_size(self._group) - 1
        self._is_first = grid.rank == self._first
        self._count = 0
        name = f"orders/{grid.dp_rank}" if of_copy else "orders"
        # Private in torch, but the only way to the store where another program made the group.
        store = dist.distributed_c10d._get_default_store()
        self._store: Any = dist.PrefixStore(name, store)  # type: ignore[attr-defined]

    def send(self, value: Any) -> None:
        """Gives a value that can be pickled to the other ranks; the first one calls it."""
        if self._num_others:
            self._store.set(str(self._count), pickle.dumps(value))
            self._count += 1

    def receive(self) -> Any:
        """Waits for the first rank's next value, and returns it; the others call it."""
        key = str(self._count)
        self._count += 1
        while True:
            with contextlib.suppress(dist.DistStoreError):  # nothing has come
                self._store.wait([key], _PATIENCE)
                break
        value = pickle.loads(self._store.get(key))
        if self._store.add(f"{key}/read", 1) == self._num_others:
            self._store.delete_key(key)
            self._store.delete_key(f"{key}/read")
        return value

    def share(self, value: Any = None) -> Any:
        """Returns the value that the first rank has, by a collective that they call together.

        None, which says that there is nothing new, costs one small message.

        Args:
            value: The first rank's value, which can be pickled.
        """
        if not self._num_others:
            return value
        device = require_active().torch_device()
        data = b"" if value is None else pickle.dumps(value)
        size = torch.tensor([len(data)], device=device)
        dist.broadcast(size, src=self._first, group=self._group)
        count = int(size.item())
        if not count:
            return None
        content = torch.zeros(count, dtype=torch.uint8, device=device)
        if self._is_first:
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(content, src=self._first, group=self._group)
        return pickle.loads(content.cpu().numpy().tobytes())


def told_by_rank_0(grid: Grid, flag: bool) -> bool:
    """Returns the flag that rank 0 has; every rank must call it."""
    if grid.world_size == 1:
        return flag
    holder = torch.tensor([flag], dtype=torch.int32, device=require_active().torch_device())
    dist.broadcast(holder, src=0)
    return bool(holder.item())
