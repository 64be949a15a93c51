"""The tests of operators notice every argument: without it, or with another type, they fail.

A call whose argument is left out, or has another dtype, must raise, or change a result by more than
the tolerance of tests/npu/test_operators.py.
"""

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.npu.test_operators import CASES, PASSES, TOLERANCE, decode, run
from tests.support.mc2 import block
from tests.support.ranks import RankPool

pytestmark = pytest.mark.dist

OTHER_TYPES = {
    torch.float32: torch.bfloat16,
    torch.bfloat16: torch.float16,
    torch.int64: torch.int32,
    torch.bool: torch.float32,
}


@dataclass
class Operators:
    """Stands for `torch.ops.npu`; changes one argument of one operator.

    Attributes:
        operator: Its name; empty for none.
        argument: Which is changed, everywhere it is given.
        way: `without` it, or with another `type`.
        given: The arguments of each operator that were seen, and whether they are tensors.
    """

    operator: str = ""
    argument: str = ""
    way: str = ""

    def __post_init__(self) -> None:
        self.given: dict[str, dict[str, bool]] = {}

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.npu, name)
        names = [one.name for one in operator.default._schema.arguments]

        def call(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            given = {key: value for key, value in given.items() if value is not None}
            seen = self.given.setdefault(name, {})
            seen |= {key: isinstance(value, torch.Tensor) for key, value in given.items()}
            if name == self.operator and self.argument in given:
                value = given.pop(self.argument)
                if self.way == "type":
                    given[self.argument] = value.to(OTHER_TYPES[value.dtype])
            return operator(**given)

        return call


def results() -> list[torch.Tensor]:
    """What the tests of operators look at."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for name in CASES:
            found += run(name, dtype)
        found += [decode(name, dtype) for name in PASSES]
    return found


def is_noticed(operators: Operators, expected: list[torch.Tensor], *, sending: bool) -> bool:
    from glm3cli.device import npu_kernels

    original, npu_kernels.npu = npu_kernels.npu, operators
    try:
        found = block(mc2=True) if sending else results()
        for ours, plain in zip(found, expected, strict=True):
            assert ours.dtype == plain.dtype
            tolerance = {"rtol": 0.1, "atol": 1.0} if sending else TOLERANCE[plain.dtype]
            torch.testing.assert_close(ours, plain, **tolerance)
    except (RuntimeError, AssertionError):
        return True
    finally:
        npu_kernels.npu = original
    return False


def unnoticed(expected: list[torch.Tensor], sending: bool) -> tuple[int, list[str]]:
    """How many changes were tried, and those that went unnoticed.

    Args:
        expected: Results of plain torch.
        sending: Whether by the operators of several ranks, or by all others.
    """
    untouched = Operators()
    assert not is_noticed(untouched, expected, sending=sending)
    tried, missed = 0, []
    for name in sorted(untouched.given):
        for argument, is_tensor in untouched.given[name].items():
            for way in ("without", "type") if is_tensor else ("without",):
                tried += 1
                if not is_noticed(Operators(name, argument, way), expected, sending=sending):
                    missed.append(f"{name}: {way} {argument}")
    return tried, missed


def test_no_argument_can_go_or_change(npu_ranks: RankPool) -> None:
    [(tried, missed)] = npu_ranks.run(1, unnoticed, results(), False)
    assert missed == []
    assert tried > 50


def sent(expected: list[list[torch.Tensor]]) -> tuple[int, list[str]]:
    return unnoticed(expected[int(os.environ["RANK"])], True)


def test_no_argument_of_what_sends_can_go_or_change(ranks: RankPool, npu_ranks: RankPool) -> None:
    for tried, missed in npu_ranks.run(2, sent, ranks.run(2, block, False)):
        assert missed == []
        assert tried == 2 * (2 * 2 + 2)  # of each, two tensors and two others
