"""`Case`: an operation on the device beside its formula on the host, forward and backward."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glm3cli.device import Device
from glm3cli.numerics.outcome import (
    NAMES,
    ROUNDING,
    Outcome,
    attempt,
    distance,
    distance_of_whole,
)

if TYPE_CHECKING:
    from glm3cli.device.kernels import Kernels

Leaves = Mapping[str, Tensor]
_SUMS = 64  # roundings of sums in fp32 that are added up in another order


@dataclass(frozen=True)
class Case:
    """An operation with its inputs.

    Attributes:
        subject: The operation, as the report has it.
        place: The shape.
        leaves: The inputs on the host: fp32 numbers that every type has exactly (see `draw`), which
            get gradients, and whole numbers. For fp32 they are made longer (see `_whole`).
        ours: Computes the result on the device, from the leaves there in the type that is checked.
        plain: Computes it on the host by the formulas of `plain`.
        kernel: The name by which --without-kernel leaves the operation out; None if it can't.
        roundings: The number of roundings to a type of 16 bits between the inputs and a result.
        sums: The same for fp32, where sums in another order count, too.
        has_gradient: Whether the gradients are compared, too.
        differences: How much larger the error of one element of a gradient may be than that of a
            result, since it is a difference of much larger numbers; the error of a whole gradient
            may not.
        precision: The type whose roundings count, if it isn't that of the result.
        has_types: Whether the operation depends on the type that the model computes in; if not, it
            is checked in fp32 alone.
    """

    subject: str
    place: str
    leaves: Leaves
    ours: "Callable[[Kernels, Leaves], Tensor]"
    plain: Callable[[Leaves], Tensor]
    kernel: str | None = None
    roundings: int = 4
    sums: int = _SUMS
    has_gradient: bool = True
    differences: int = 1
    precision: torch.dtype | None = None
    has_types: bool = True

    def outcomes(self, device: Device) -> Iterator[Outcome]:
        """Yields what is found in every type."""
        whole = {name: _whole(one) for name, one in self.leaves.items()}
        yield self._outcome(device, torch.float32, whole, self._right(whole))
        if not self.has_types:
            return
        right = self._right(self.leaves)
        for dtype in (torch.bfloat16, torch.float16):
            yield self._outcome(device, dtype, self.leaves, right)

    def _right(self, given: Leaves) -> dict[str, Tensor]:
        """Returns the right result, and the right gradient of each leaf that has one."""
        leaves = {name: _leaf(one, self.has_gradient) for name, one in given.items()}
        result = self.plain(leaves)
        if self.has_gradient:
            torch.autograd.backward(result, _upstream(result).to(result))
        return {"result": result.detach()} | _gradients(leaves)

    def _outcome(
        self, device: Device, dtype: torch.dtype, leaves: Leaves, right: dict[str, Tensor]
    ) -> Outcome:
        """Computes on the device in one type, and compares the result and each gradient."""
        found, trouble = attempt(lambda: self._on_device(device, dtype, leaves))
        if found is None:
            return self._named(dtype, torch.inf, 0.0, "", self.place, trouble)
        outcomes = [
            self._named(dtype, *compared)
            for name, ours in found.items()
            for compared in self._compared(name, ours, right[name])
        ]
        return max(outcomes, key=lambda one: one.strain)

    def _compared(
        self, name: str, ours: Tensor, right: Tensor
    ) -> Iterator[tuple[float, float, str, str]]:
        """Yields the error, the limit, its reason, and the place of a result or a gradient.

        Args:
            name: `result`, or the name of the leaf that the gradient is of.
            ours: The tensor on the device.
            right: The right one on the host.
        """
        limit, why = self._limit(ours.dtype)
        place = self.place
        if name != "result":
            place += f", gradient of {name}"
            if self.differences > 1:
                yield distance_of_whole(ours, right), limit, why, f"{place} as a whole"
                limit, why = limit * self.differences, f"{self.differences} x {why}"
        yield distance(ours, right), limit, why, place

    def _on_device(self, device: Device, dtype: torch.dtype, leaves: Leaves) -> dict[str, Tensor]:
        """Returns the result and the gradients on the device."""
        put = {
            name: _leaf(
                one.to(device.torch_device(), dtype if one.is_floating_point() else None),
                self.has_gradient,
            )
            for name, one in leaves.items()
        }
        with torch.set_grad_enabled(self.has_gradient):
            result = self.ours(device.kernels, put)
        if self.has_gradient:
            torch.autograd.backward(result, _upstream(result).to(result))
        return {"result": result.detach()} | _gradients(put)

    def _limit(self, dtype: torch.dtype) -> tuple[float, str]:
        """Returns the largest right error of a result of a type, with the reason."""
        precision = self.precision or dtype
        number = self.sums if precision == torch.float32 else self.roundings
        of_sums = ", of sums in another order" if precision == torch.float32 else ""
        why = f"{number} roundings to {NAMES[precision]}{of_sums}"
        return number * ROUNDING[precision], why

    def _named(
        self,
        dtype: torch.dtype,
        error: float,
        limit: float,
        why: str,
        place: str,
        trouble: str = "",
    ) -> Outcome:
        """Returns an outcome of this case."""
        way_out = (
            f"--without-kernel {self.kernel} computes it in plain torch" if self.kernel else ""
        )
        return Outcome(self.subject, NAMES[dtype], error, limit, why, place, way_out, trouble)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Returns random numbers around 1 that every type has exactly: sixteenths, up to 8."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(shape))
    return (torch.randn(shape, generator=generator) * 16).round().clamp(-127, 127) / 16


def _whole(tensor: Tensor) -> Tensor:
    """Makes fp32 numbers that need all their bits, which an operator might cut off."""
    return tensor * (2 / 3) if tensor.is_floating_point() else tensor


def _upstream(result: Tensor) -> Tensor:
    """Returns the gradient of a result: numbers that every type has exactly, on the host."""
    return draw(*result.shape, seed=7)


def _leaf(tensor: Tensor, has_gradient: bool) -> Tensor:
    """Returns a tensor of its own that collects a gradient, if it may have one."""
    return tensor.detach().clone().requires_grad_(has_gradient and tensor.is_floating_point())


def _gradients(leaves: Leaves) -> dict[str, Tensor]:
    """Returns the gradients of the leaves that have one, by the names of these."""
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
