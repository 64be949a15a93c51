"""Which tensors of an emulated NPU are on the card, and what a card refuses or does slowly.

All tensors of the emulation are on the CPU. Those that would be on a card are told apart by how
they were made: with the device `ON_CARD`, by `Tensor.cuda`, or from other tensors on the card. What
`Tensor.cpu` and `Tensor.to("cpu")` return is on the host again.

`Refused` is raised for whatever torch_npu, its drivers or HCCL do wrong or by detours, wherever it
happens: a rule holds for the whole kind, not for the one place at which it was found.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import _SHARDED_OPS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# torch counts CPUs, but makes all of their tensors on the same one, which has no number.
ON_CARD = torch.device("cpu", 0)
_WIDE = (torch.float64, torch.complex128)
# Operators whose result has a shape that depends on values: the host waits for the card.
_WAITS = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")
# Operators that copy what may be the host's; the last one is called by torch.tensor.
_COPIES = ("copy_", "_to_copy", "lift_fresh")
# Operators all of whose tensors must be on the card. Others get some of torch itself, of which this
# emulation can't say where they are, or one number of the host.
_STRICT = ("npu_", "_npu_", "_foreach_", "_fused_")
_READS = ("_local_scalar_dense", "equal", "is_nonzero")


class Refused(RuntimeError):
    """What a card would refuse, or do in a way that glm3 must not rely on."""


class Card(TorchDispatchMode):
    """Follows the tensors of a card in this thread, refuses what it must, and counts the rest.

    Attributes:
        launches: The operators that computed on the card, by name; views are none.
        waits: What made the host wait for the card, by name.
        graph: The graph that is captured at present; None for none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.graph: Any = None

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Notes that a tensor is on the card, and returns it."""
        if len(self._storages) > 10_000:
            alive = {key: ref for key, ref in self._storages.items() if not ref.expired()}
            self._storages = alive
        reference = StorageWeakRef(tensor.untyped_storage())
        self._storages[reference.cdata] = reference
        return tensor

    def has(self, tensor: torch.Tensor) -> bool:
        # The weak reference keeps the address from being given to another storage.
        return tensor.untyped_storage()._cdata in self._storages

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        given = list(tensors_in((args, kwargs)))
        here = any(map(self.has, given))
        target = kwargs.get("device")
        if target is not None and target.type == "cpu":
            # Within a graph, all that is made where another tensor is belongs to the card.
            moves, here = here, target.index == 0 or self.graph is not None
            if moves or here:
                _check_types(function, given, kwargs.get("dtype"))
        name = function.overloadpacket.__name__
        if self.graph is not None:
            stray = name in _COPIES and not all(map(self.has, given))
            _refuse(stray, f"{name} copies from the host within a graph")
            _refuse(function.namespace == "c10d", f"{name} sends within a graph")
        if here:
            self._check(name, function, given, args)
        result = function(*args, **kwargs)
        if here:
            for tensor in tensors_in(result):
                _refuse(tensor.dtype in _WIDE, f"{name} gives fp64 on the card")
                self.put(tensor)
            if self.graph is not None:
                self.graph.note(function, args, kwargs, result)
        return result

    def _check(self, name: str, function: Any, given: list[torch.Tensor], args: Any) -> None:
        if name.startswith(_STRICT):
            elsewhere = not all(map(self.has, given))
            _refuse(elsewhere, f"{name} takes tensors of the host and of the card at once")
        for tensor in given:
            is_own = self.has(tensor) and tensor.dtype in _WIDE
            _refuse(is_own, f"{name} computes in fp64, which is slow, and which HCCL can't reduce")
        if name.startswith(("index", "_index_put")):
            masks = (torch.bool, torch.uint8)
            indices = [one for one in tree_leaves(args[1]) if isinstance(one, torch.Tensor)]
            found = any(one.dtype in masks for one in indices)
            _refuse(found, f"{name} by a mask makes the host wait for the number of its elements")
        if name in (*_WAITS, *_READS):
            self.wait(name)
        elif not function.is_view:
            self.launches[name] += 1

    def wait(self, name: str) -> None:
        """Notes that the host waits."""
        _refuse(self.graph is not None, f"{name}: the host waits within a graph")
        self.waits[name] += 1

    @contextmanager
    def counting(self) -> Iterator[tuple[Counter[str], Counter[str]]]:
        """Yields the launches and the waits of the block."""
        self.launches, self.waits = Counter(), Counter()
        yield self.launches, self.waits
        self.launches, self.waits = Counter(), Counter()


def tensors_in(values: Any) -> Iterable[torch.Tensor]:
    return (one for one in tree_leaves(values) if isinstance(one, torch.Tensor))


def _check_types(function: Any, given: list[torch.Tensor], dtype: torch.dtype | None) -> None:
    """A copy between host and card that changes the type is converted on the card."""
    if "copy" in str(function):
        types = {dtype, *(tensor.dtype for tensor in given)}
        _refuse(bool(types & set(_WIDE)), f"{function} converts fp64 on the card")


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise Refused(message)


def follow(card: Card) -> None:
    """Makes torch's copies between host and card known to a card, for as long as the process lives.

    A copy to the host that doesn't wait is refused: torch_npu pins the host's memory for it, and
    the driver doesn't map pinned memory into processes that are forked, such as the writers of a
    checkpoint (aclrtMallocHost; svm_module_ops.c: VM_DONTCOPY).
    """
    to, tolist = torch.Tensor.to, torch.Tensor.tolist

    def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.Tensor):  # whose device torch doesn't ask for here
            args = (args[0].device, args[0].dtype, *args[1:])
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        result = to(tensor, *args, **kwargs)
        if device is None or device.type != "cpu":
            return result
        if device.index == 0:
            stray = card.graph is not None and not card.has(tensor)
            _refuse(stray, "a tensor of the host is copied within a graph")
            return card.put(result if card.has(result) else _copied(result))
        if card.has(tensor):
            _refuse(non_blocking, "a copy to the host without waiting pins memory, and forks hang")
            card.wait("copy to the host")
            return _copied(result) if card.has(result) else result
        return result

    def to_host(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return moved(tensor, "cpu", *args, **kwargs)

    def listed(tensor: torch.Tensor) -> Any:
        if card.has(tensor):
            card.wait("tolist")
        return tolist(tensor)

    def copied_into(original: Callable[..., Any]) -> Callable[..., Any]:
        def copy(tensor: torch.Tensor, source: Any, non_blocking: bool = False) -> Any:
            pins = non_blocking and card.has(source) and not card.has(tensor)
            _refuse(pins, "a copy to the host without waiting pins memory, and forks hang")
            return original(tensor, source, non_blocking)

        return copy

    def made(original: Callable[..., Any]) -> Callable[..., Any]:
        """Only the copy of a Python number to the host is seen where operators are dispatched."""

        def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            tensor = original(*args, device=device, **kwargs)
            on_card = device == ON_CARD or str(device).startswith(("cuda", "npu"))
            return card.put(tensor) if on_card else tensor

        return make

    device = torch.Tensor.device

    def device_of(tensor: torch.Tensor) -> torch.device:
        # Another kind, such as a ShardedTensor, has no storage of its own.
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        return ON_CARD if is_plain and card.has(tensor) else device.__get__(tensor)

    # So that what is made on the device of a tensor of the card is there, too.
    torch.Tensor.device = property(device_of)
    _SHARDED_OPS[torch.Tensor.device.__get__] = _SHARDED_OPS[device.__get__]
    torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.tolist = moved, to_host, listed
    torch.tensor = made(torch.tensor)
    torch.Tensor.copy_ = copied_into(torch.Tensor.copy_)
    torch.Tensor.cuda = lambda tensor, *_args, **_kwargs: card.put(tensor)
    for module in (torch.cuda, torch.npu):
        module.synchronize = lambda *_args: card.wait("synchronize")
    card.__enter__()


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    with _disable_current_modes():
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)
