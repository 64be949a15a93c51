"""What torch's own operators must do on a chip, beside the kernels: overflow, NaN, and choices.

fp16 training relies on numbers that overflow becoming infinite, which it sees and skips; some chips
have a mode in which they stop at the largest number instead. Sampling relies on sorting, sums and
choices over the whole vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from glm3cli.config.presets import PRESETS
from glm3cli.device import Device
from glm3cli.numerics.outcome import NAMES, Outcome, attempt

_VOCABULARY = PRESETS["6b"].padded_vocab_size
_SAME = "the host's result"
_WAY_OUT = "train in bf16 or fp32"


def check_traps(device: Device) -> Iterator[Outcome]:
    """Yields how many elements of each result differ from the host's in kind or in place."""
    where = device.torch_device()
    for dtype in (torch.float16, torch.bfloat16):
        large = torch.finfo(dtype).max
        for name, right, ours in _overflows(large, dtype, where):
            yield _outcome(f"overflow: {name}", dtype, ours, right, _WAY_OUT)
    for dtype in NAMES:
        for name, right, ours in _not_a_number(dtype, where):
            yield _outcome(f"NaN: {name}", dtype, ours, right)
    for name, right, ours in _choices(where):
        yield _outcome(f"choice: {name}", torch.float32, ours, right)


# A name, the right result, and what computes it on the device.
_Trap = tuple[str, Tensor, Callable[[], Tensor]]


def _overflows(large: float, dtype: torch.dtype, where: torch.device) -> Iterator[_Trap]:
    """Yields what becomes infinite: sums, products, and numbers that are cast."""
    numbers = torch.full((64, 64), large, dtype=dtype, device=where)
    infinite = torch.full((64, 64), torch.inf)
    yield "sum", infinite, lambda: numbers + numbers
    yield "product", -infinite, lambda: numbers * -2
    yield "matrix product", infinite, lambda: numbers @ torch.ones_like(numbers)
    wide = torch.full((64, 64), 3e38, device=where) * (1 if dtype == torch.float16 else 1.2)
    yield "cast", infinite, lambda: wide.to(dtype)
    yield "is seen", torch.tensor([False]), lambda: (numbers + numbers).isfinite().all().view(1)


def _not_a_number(dtype: torch.dtype, where: torch.device) -> Iterator[_Trap]:
    """Yields what one NaN among many numbers must make of a sum, a norm, and a product."""
    numbers = torch.ones(4096, dtype=dtype, device=where)
    numbers[1234] = torch.nan
    nan, no = torch.tensor([torch.nan]), torch.tensor([False])
    yield "sum", nan, lambda: numbers.sum().view(1)
    yield "norm", nan, lambda: numbers.norm().view(1)
    yield "maximum", nan, lambda: numbers.max().view(1)
    yield "dot product", nan, lambda: (numbers @ torch.ones_like(numbers)).view(1)
    yield "is seen", no, lambda: numbers.isfinite().all().view(1)


def _choices(where: torch.device) -> Iterator[_Trap]:
    """Yields what sampling asks of a vocabulary of distinct numbers."""
    host = torch.randperm(_VOCABULARY, generator=torch.Generator().manual_seed(3)).float()
    numbers = host.to(where)
    order = host.argsort(descending=True)
    yield "argmax", order[:1], lambda: numbers.argmax().view(1)
    yield "topk", order[:200], lambda: numbers.topk(200).indices
    yield "sort", order, lambda: numbers.sort(descending=True).indices
    yield "gather", host[order], lambda: numbers.gather(0, order.to(where))
    total = torch.ones(_VOCABULARY).cumsum(0)
    yield "cumulative sum", total, lambda: torch.ones(_VOCABULARY, device=where).cumsum(0)
    many = torch.full((2**20,), 2**13 + 1)
    yield "whole sum", many.sum().view(1), lambda: many.to(where).sum().view(1)


def _outcome(
    subject: str, dtype: torch.dtype, ours: Callable[[], Tensor], right: Tensor, way_out: str = ""
) -> Outcome:
    """Computes a result, and counts the elements that are wrong."""
    found, trouble = attempt(lambda: ours().to("cpu"))
    if found is None:
        return Outcome(subject, NAMES[dtype], torch.inf, 0.0, _SAME, "", way_out, trouble)
    same = (found == right) | (found.isnan() & right.isnan())
    return Outcome(subject, NAMES[dtype], float((~same).sum()), 0.0, _SAME, "", way_out)
