"""`BySegments`: what kernels know of packed sequences, found again in every layer.

All layers of a pass get the same segment ids, but not the same object: recomputation hands on a
tensor of its own that shares their memory. So they are known by their memory.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")


class BySegments(Generic[T]):
    """Values by the memory of segment ids; a value goes when that memory is freed."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, T]] = {}  # by the storage's address

    def put(self, segment_ids: Tensor, value: T) -> None:
        """Notes a value for segment ids, which must not change afterwards."""
        self._known = {key: one for key, one in self._known.items() if not one[0].expired()}
        # While there is a weak reference, no other storage gets the address.
        reference: Any = StorageWeakRef(segment_ids.untyped_storage())  # type: ignore[no-untyped-call]
        self._known[reference.cdata] = reference, value

    def get(self, segment_ids: Tensor, make: Callable[[], T]) -> T:
        """Returns the value for segment ids, which `make` makes if there is none yet."""
        key = segment_ids.untyped_storage()._cdata
        if key not in self._known:
            self.put(segment_ids, make())
        return self._known[key][1]
