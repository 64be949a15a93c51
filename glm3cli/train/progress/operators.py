"""What a step has really computed with: the operators of the chip, and those of the host.

A run records its first step. Which operators ran there is no guess from settings: torch sees each
of them.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from glm3cli.device import require_active
from glm3cli.device.choice import OPERATORS, reason_unused

# An operator without a kernel for its device may be one of these, which call others.
_COMPOSITE = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")


class Recorder(TorchDispatchMode):
    """Notes the operators that run within the block of a `with`.

    Attributes:
        seen: The operators, as torch.ops has them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]  # noqa: ANN204
        """Runs an operator as it would run without this."""
        self.seen.add(function)
        return function(*args, **(kwargs or {}))


def describe(seen: Iterable[Any]) -> dict[str, Any]:
    """Returns what ran on all ranks, which must call it together.

    Args:
        seen: The operators that this rank has run.

    Returns:
        `used`, the operator of the chip by each name of --without-kernel; `unused`, the reason
        where there was none; and `on_host`, the operators that the chip's library left to the host.
    """
    seen, device = list(seen), require_active()
    here = {one.overloadpacket.__name__ for one in seen}, set(on_host(seen, device.torch_device()))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, here)
    names = set().union(*(part[0] for part in parts))
    used = {
        name: operator
        for name, operators in OPERATORS.items()
        for operator in operators
        if operator in names
    }
    unused = {
        name: reason_unused(name, device.kernels_class, device.without_kernels)
        for name in OPERATORS
        if name not in used
    }
    return {
        "used": used,
        "unused": unused,
        "on_host": ", ".join(sorted(set().union(*(part[1] for part in parts)))) or "none",
    }


def on_host(seen: Iterable[Any], device: torch.device) -> list[str]:
    """Returns the operators of torch that have no kernel for a device, and run on the host.

    Args:
        seen: Operators that have run.
        device: The device of their tensors.
    """
    if device.type == "cpu":
        return []
    key = torch._C._dispatch_key_for_device(device.type)
    return [one.name() for one in seen if one.namespace == "aten" and not _has_kernel(one, key)]


def _has_kernel(operator: Any, key: str) -> bool:
    """Returns whether an operator of torch has a kernel for a dispatch key, or calls others.

    torch makes many an operator of its variant with the argument `out`, if that has a kernel.
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    name = operator.name()
    out = f"{operator._schema.name.removesuffix('_')}.out"
    if any(has(name, one) for one in (key, *_COMPOSITE)):
        return True
    return bool(torch._C._dispatch_has_kernel(out)) and bool(has(out, key))
