"""Buffers that are used again for one tensor after the other, and a tensor's bytes without a copy.

Fresh memory for every joined or cut tensor would have to be cleared by the operating system first,
which takes longer than filling it.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# A function like torch.cat: joins tensors along a dimension.
Cat = Callable[[list[Tensor], int], Tensor]
# Hardly any tensors but the embedding and the output layer of a large model are larger.
_MOST_BYTES = 2**28
_BLOCK = 2**23  # bytes; smaller ones take more calls, larger ones leave the processor's caches


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns a view of a tensor's bytes; of a copy if the tensor isn't contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def blocks_of(tensor: Tensor) -> Iterator[memoryview]:
    """Yields a tensor's bytes in blocks, so that others can follow while the tensor is written."""
    values = bytes_of(tensor)
    for start in range(0, values.nbytes, _BLOCK):
        yield values[start : start + _BLOCK]


class Scratch:
    """A buffer for each thread, whose tensor is valid until the same thread asks for another."""

    def __init__(self) -> None:
        """Begins without any."""
        self._of_thread = threading.local()

    def cat(self, tensors: list[Tensor], dim: int = 0) -> Tensor:
        """Joins tensors along a dimension, like torch.cat, in the buffer."""
        shape = list(tensors[0].shape)
        shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
        dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
        return torch.cat(tensors, dim=dim, out=self._take(shape, dtype))

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the tensor itself if it has this type, else a copy of it in the buffer."""
        if tensor.dtype == dtype:
            return tensor
        return self._take(list(tensor.shape), dtype).copy_(tensor)

    def contiguous(self, tensor: Tensor) -> Tensor:
        """Returns the tensor itself if it is contiguous, else a copy in the buffer."""
        if tensor.is_contiguous():
            return tensor
        return self._take(list(tensor.shape), tensor.dtype).copy_(tensor)

    def _take(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        """Returns an uninitialised tensor in the buffer; a huge one gets fresh memory."""
        size = math.prod(shape) * dtype.itemsize
        buffer: Tensor = self._of_thread.__dict__.pop("buffer", torch.empty(0, dtype=torch.uint8))
        if size > _MOST_BYTES:  # without the buffer: there is seldom room for both
            return torch.empty(shape, dtype=dtype)
        if buffer.nbytes < size:
            buffer = torch.empty(size, dtype=torch.uint8)
        self._of_thread.buffer = buffer
        return buffer[:size].view(dtype).view(shape)
