"""Records the operators that code calls, each with its operations, bytes, or message.

A dispatch mode sees every operator of torch, of the chip's kernels, and of torch.distributed, on
real tensors and on meta tensors, which have no data.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glm3cli.device.operations import ATTENTION, MATRIX

OperatorKind = Literal["matrix", "attention", "memory", "message"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Operator:
    """One call of an operator.

    Attributes:
        name: The operator's namespace and name as torch has them, such as aten.mm.
        kind: What the operator does: a matrix product, attention, a message, or anything else
            that moves memory.
        flops: Floating-point operations of matrix products and attention; 0 for other operators.
        bytes: Bytes that the call reads and writes; for a message, the size of the whole tensor
            that the ranks share.
        shapes: The shapes of the results.
        ranks: The ranks that take part in a message; empty for other operators.
    """

    name: str
    kind: OperatorKind
    flops: float
    bytes: int
    shapes: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...] = ()


class Recorder(TorchDispatchMode):
    """Lists an `Operator` for every call that moves or computes something.

    Attributes:
        operators: The calls so far, in their order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            # A meta tensor has no number to read; nothing that is counted depends on it.
            return 1 if args[0].is_meta else func(*args, **kwargs)
        if func.namespace == "c10d":
            self.operators.append(_message(func, args))
            return _answer(func, args, kwargs)
        result = func(*args, **kwargs)
        if not _is_free(func):
            self.operators.append(_operator(func, args, kwargs, result))
        return result


@contextmanager
def recording() -> Iterator[list[Operator]]:
    """Yields the list of the operators that the block calls, which is filled while it runs."""
    recorder = Recorder()
    with _Numberless(), recorder:
        yield recorder.operators


class _Numberless(TorchFunctionMode):
    """Makes `torch.tensor` work on a list of meta tensors.

    It would read their numbers, in code that no dispatch mode sees.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") == "tensor" and args:
            metas = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)]
            if any(leaf.is_meta for leaf in metas):
                return torch.empty(len(metas), device="meta")
        return func(*args, **(kwargs or {}))


def _is_free(func: Any) -> bool:
    """Returns whether an operator costs nothing: a view, an allocation, or a profiler's mark."""
    return (
        func.is_view
        or func.namespace == "profiler"
        or "empty" in func.__name__
        or func is aten._unsafe_view.default
    )


def _operator(func: Any, args: Any, kwargs: Any, result: Any) -> Operator:
    """Describes a call that is no message."""
    results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    name = str(func.overloadpacket)
    count = MATRIX.get(name) or ATTENTION.get(name)
    kind: OperatorKind = "memory"
    if count is not None:
        kind = "matrix" if name in MATRIX else "attention"
    return Operator(
        name=name,
        kind=kind,
        flops=0.0 if count is None else count(_named(func, args, kwargs)),
        bytes=_moved(func, args, kwargs, results),
        shapes=tuple(tuple(one.shape) for one in results),
    )


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns the arguments of a call by name."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _moved(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> int:
    """Returns the bytes that a call reads and writes."""
    written = sum(map(_size, results))
    packet = func.overloadpacket
    if packet in _LOOK_UPS:  # a table of which few rows are read or written
        return 2 * min(written, *map(_size, _tensors(args)))
    if packet in _OVERWRITES:  # the first argument is written and not read
        args = args[1:]
    # Tensors that are passed as `out=` aren't read, either.
    outs = {argument.name for argument in func._schema.arguments if argument.is_out}
    read = [*_tensors(args), *_tensors([kwargs[name] for name in kwargs if name not in outs])]
    return written + sum(map(_size, read))


def _tensors(values: Any) -> list[Tensor]:
    """Returns the tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    """Returns the bytes of a tensor's numbers in memory: an expanded tensor has few."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


_LOOK_UPS = {aten.embedding, aten.gather, aten.scatter_add_}
_OVERWRITES = {aten.copy_, aten.zero_, aten.fill_}


# --- messages ---


def _message(func: Any, args: Any) -> Operator:
    """Describes a call of torch.distributed."""
    names = [argument.name for argument in func._schema.arguments]
    group = dist.ProcessGroup.unbox(args[names.index("process_group")])
    before = args[: names.index("process_group")]
    return Operator(
        name=str(func.overloadpacket),
        kind="message",
        flops=0.0,
        bytes=max((sum(map(_size, _tensors(one))) for one in before), default=0),
        shapes=tuple(tuple(one.shape) for one in _tensors(before[:1])),
        ranks=tuple(dist.get_process_group_ranks(group)),
    )


def _answer(func: Any, args: Any, kwargs: Any) -> Any:
    """Sends a message of real tensors; for meta tensors, returns what sending would return.

    Not every message of torch works on meta tensors.
    """
    if not all(tensor.is_meta for tensor in _tensors(args)):
        return func(*args, **kwargs)
    from torch._C._distributed_c10d import FakeWork

    work = FakeWork().boxed()
    return (args[0], work) if len(func._schema.returns) == 2 else work
