"""`Outcome`: what a check has found, and how errors are measured."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# The largest relative error of rounding to a type: half the distance of two neighbours.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_SMALLEST = 1e-30  # of what errors are divided by
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Outcome:
    """The result of a check on one rank.

    Attributes:
        subject: What was checked.
        dtype: The type that it was checked in; empty where it has none.
        error: The largest error that was found; infinite if there was no result to compare.
        limit: The largest error that is right.
        why: The reason for the limit.
        place: The shape, or the part of the result, that had the largest error.
        way_out: What a user can do without this; empty if nothing is known.
        trouble: The text of the exception that was raised; empty without one.
        rank: The rank that has found it.
    """

    subject: str
    dtype: str
    error: float
    limit: float
    why: str
    place: str = ""
    way_out: str = ""
    trouble: str = ""
    rank: int = 0

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit; an error that is no number isn't."""
        return not self.trouble and self.error <= self.limit

    @property
    def strain(self) -> float:
        """The share of the limit that the error takes; infinite if it isn't finite."""
        if self.trouble or not math.isfinite(self.error):
            return math.inf
        return self.error / self.limit if self.limit else self.error and math.inf

    @property
    def sentence(self) -> str:
        """The failure as a sentence, with what to do."""
        name = f"{self.subject}, {self.dtype}" if self.dtype else self.subject
        where = f" ({self.place}, rank {self.rank})" if self.place else f" (rank {self.rank})"
        if self.trouble:
            found = f"{name}{where}: {self.trouble}"
        else:
            found = (
                f"{name}{where}: the error is {self.error:.2g}, and the limit {self.limit:.2g}, "
                f"{self.why}"
            )
        return f"{found}; {self.way_out}" if self.way_out else found

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields and `ok` by their names, for JSON; what isn't finite is None."""
        error = self.error if math.isfinite(self.error) else None
        return {**asdict(self), "error": error, "ok": self.ok}


def distance(ours: Tensor, plain: Tensor) -> float:
    """Returns the largest error of a result, relative to what is right.

    The error of an element is divided by the sum of its right absolute value and of the root mean
    square of all of them but zeros: large elements have their relative error, and small ones, which
    sums of large ones leave over, aren't asked for more than the others can give. What is zero
    because nothing depends on it, such as the gradient of most positions where few are compared,
    says nothing about the size of the others.

    Args:
        ours: The result, on any device and in any type.
        plain: The right numbers, in fp64 on the host, of the same shape.
    """
    if ours.shape != plain.shape:
        return math.inf
    ours, plain = ours.detach().to("cpu").double(), plain.detach().double()
    count = max(int(plain.count_nonzero()), 1)
    scale = plain.abs() + (plain.square().sum() / count).sqrt()
    errors = (ours - plain).abs() / scale.clamp(min=_SMALLEST)
    return float(torch.where(errors.isfinite(), errors, math.inf).max())


def distance_of_whole(ours: Tensor, plain: Tensor) -> float:
    """Returns the norm of all errors of a tensor, relative to the norm of the right one.

    Args:
        ours: The tensor, on any device and in any type.
        plain: The right numbers, in fp64 on the host, of the same shape.
    """
    if ours.shape != plain.shape:
        return math.inf
    ours, plain = ours.detach().to("cpu").double(), plain.detach().double()
    error = float((ours - plain).norm() / plain.norm().clamp(min=_SMALLEST))
    return error if math.isfinite(error) else math.inf


def worst(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Returns one outcome for each subject and type, the one nearest to its limit, in order."""
    found: dict[tuple[str, str], Outcome] = {}
    for one in outcomes:
        key = one.subject, one.dtype
        if key not in found or found[key].strain < one.strain:
            found[key] = one
    return list(found.values())


# --- errors ---


def attempt(compute: Callable[[], T]) -> tuple[T | None, str]:
    """Returns a result, and an empty text; or None and the first line of the error.

    An operator may refuse by any error, and the others are to be checked all the same.

    Args:
        compute: Computes the result.
    """
    try:
        return compute(), ""
    except Exception as error:
        return None, _first_line(error)


def survived(subject: str, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """Yields outcomes, and the error that ends them as one more.

    Args:
        subject: What was checked when the error came.
        outcomes: The outcomes.
    """
    try:
        yield from outcomes
    except Exception as error:
        yield Outcome(subject, "", math.inf, 0.0, "", trouble=_first_line(error))


def _first_line(error: Exception) -> str:
    """Returns the first line of an error's text, or its class's name if it has no text."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
