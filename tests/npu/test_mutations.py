"""The tests of operators notice every argument: they fail without it, or if it has another type.

A call whose argument is left out, or has another dtype, must raise, or change a result by more than
the tolerance of tests/npu/test_operators.py.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from tests.npu.test_operators import CASES, INFERENCE, TOLERANCE, infer, run
from tests.support.mc2 import block
from tests.support.ranks import RankPool

pytestmark = [pytest.mark.dist, pytest.mark.slow]

OTHER_TYPES = {
    torch.float32: torch.bfloat16,
    torch.bfloat16: torch.float16,
    torch.int64: torch.int32,
    torch.int32: torch.int64,
    torch.int8: torch.int32,
    torch.bool: torch.float32,
}


@dataclass
class Operators:
    """Stands for `torch.ops.npu`; changes one argument of one operator.

    Attributes:
        operator: Name of the operator whose calls are changed; empty for none.
        argument: The argument that is changed in each of them.
        way: How it is changed: `without` it, or with another `type`.
        given: The arguments that each operator was called with, and whether they are tensors.
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


Task = Callable[[], list[torch.Tensor]]


def tasks() -> list[Task]:
    """Returns the functions that the tests of operators compare, by name."""
    found: list[Task] = []
    for dtype in (torch.float32, torch.bfloat16):
        found += [partial(run, name, dtype) for name in CASES]
        found += [partial(lambda *args: [infer(*args)], name, dtype) for name in INFERENCE]
    return found


def is_noticed(operators: Operators, task: Task, expected: list[torch.Tensor], sends: bool) -> bool:
    from glm3cli.device.npu import few_bits, kernels

    original = kernels.npu
    kernels.npu = few_bits.npu = operators
    try:
        for ours, plain in zip(task(), expected, strict=True):
            assert ours.dtype == plain.dtype
            tolerance = {"rtol": 0.1, "atol": 1.0} if sends else TOLERANCE[plain.dtype]
            torch.testing.assert_close(ours, plain, **tolerance)
    except (RuntimeError, AssertionError):
        return True
    finally:
        kernels.npu = few_bits.npu = original
    return False


def unnoticed(expected: list[list[torch.Tensor]], sends: bool) -> tuple[int, list[str]]:
    """Returns how many changes were tried, and those that none of the tasks noticed.

    Args:
        expected: The results of plain torch for each task.
        sends: Whether the operators of several ranks are changed, or all others.
    """
    cases = []
    changes = set()
    for task, plain in zip(_sending() if sends else tasks(), expected, strict=True):
        untouched = Operators()
        assert not is_noticed(untouched, task, plain, sends)
        given = {(name, key) for name, seen in untouched.given.items() for key in seen}
        cases.append((given, task, plain))
        changes |= {(*one, "without") for one in given}
        changes |= {(name, key, "type") for name, key in given if untouched.given[name][key]}
    missed = [
        f"{name}: {way} {key}"
        for name, key, way in sorted(changes)
        if not any(
            is_noticed(Operators(name, key, way), task, plain, sends)
            for given, task, plain in cases
            if (name, key) in given
        )
    ]
    return len(changes), missed


def _sending() -> list[Task]:
    return [partial(block, mc2=True)]


def test_no_argument_can_go_or_change(npu_ranks: RankPool) -> None:
    expected = [task() for task in tasks()]
    [(tried, missed)] = npu_ranks.run(1, unnoticed, expected, False)
    assert missed == []
    assert tried > 50


def sent(expected: list[list[torch.Tensor]]) -> tuple[int, list[str]]:
    return unnoticed([expected[int(os.environ["RANK"])]], True)


def test_no_argument_of_what_sends_can_go_or_change(ranks: RankPool, npu_ranks: RankPool) -> None:
    for tried, missed in npu_ranks.run(2, sent, ranks.run(2, block, False)):
        assert missed == []
        assert tried == 2 * (2 * 2 + 2)  # of each, two tensors and two others
