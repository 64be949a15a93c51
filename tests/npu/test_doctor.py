"""`glm3 doctor --numerics` on the emulated NPU: it passes, and finds every fault that is put in."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.support.npu import faults
from tests.support.ranks import RankPool

pytestmark = pytest.mark.dist
LONG = 2112


@cache
def cases() -> Any:
    """Returns all operations; the numbers are drawn once in a process."""
    from glm3cli.numerics.decoding_cases import decoding_cases
    from glm3cli.numerics.training_cases import training_cases

    return tuple(chain(training_cases(LONG), decoding_cases()))


def first_failure(outcomes: Iterator[Any]) -> str:
    """Returns the sentence of the first failure; empty without any."""
    return next((one.sentence for one in outcomes if not one.ok), "")


def failures_of_operators(names: list[str]) -> dict[str, str]:
    """Returns what is said about faults of operators."""
    from glm3cli.device import require_active

    said, device = {}, require_active()
    for name in names:
        subject, fault = faults.OPERATORS[name]
        mine = (case for case in cases() if case.subject == subject)
        with fault():
            said[name] = first_failure(one for case in mine for one in case.outcomes(device))
    return said


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [sorted(faults.OPERATORS.keys() - faults.LONG), sorted(faults.LONG)],
    ids=["short", "long"],
)
def test_every_fault_of_an_operator_is_found_with_a_way_out(
    npu_ranks: RankPool, names: list[str]
) -> None:
    [said] = npu_ranks.run(1, failures_of_operators, names)
    for name in names:
        subject, _ = faults.OPERATORS[name]
        assert said[name].startswith(f"{subject}, "), name
        assert "; --without-kernel " in said[name], name


def failures_of_traps() -> dict[str, str]:
    from glm3cli.device import require_active
    from glm3cli.numerics.traps import check_traps

    said = {}
    for name, fault in faults.TRAPS.items():
        with fault():
            said[name] = first_failure(check_traps(require_active()))
    return said


@pytest.mark.slow
def test_every_fault_of_torchs_own_operators_is_found(npu_ranks: RankPool) -> None:
    [said] = npu_ranks.run(1, failures_of_traps)
    assert [name for name, text in said.items() if not text] == []


def failures_of_collectives() -> dict[str, str]:
    """Returns what this rank says about each fault of a collective; empty for none."""
    from glm3cli.config.parallel import ParallelConfig
    from glm3cli.device import require_active
    from glm3cli.numerics import collectives
    from glm3cli.parallel.groups import open_grid

    said = {}
    with open_grid(ParallelConfig()), patch.object(collectives, "_SIZES", (1001,)):
        for name, fault in {"": nullcontext, **faults.COLLECTIVES}.items():
            with fault():
                outcomes = [*collectives.check_collectives(require_active())]
            said[name] = first_failure(iter(outcomes))
    return said


@pytest.mark.slow
def test_every_fault_of_a_collective_is_found(npu_ranks: RankPool) -> None:
    first, second = npu_ranks.run(2, failures_of_collectives)
    assert first[""] == second[""] == ""
    del first[""], second[""]
    assert [name for name in faults.COLLECTIVES if not first[name] + second[name]] == []


def failures_of_the_model(folder: Path, fault: str) -> str:
    """Returns what is said about a fault while a small model trains, saves, and generates."""
    from glm3cli.numerics import small_model
    from glm3cli.numerics.outcome import survived

    fp32 = {"fp32": small_model.TORCH_DTYPES["fp32"]}
    with patch.object(small_model, "TORCH_DTYPES", fp32), faults.MODELS[fault]():
        outcomes = small_model.check_small_model(small_model.Sizes(), 1, folder)
        return first_failure(iter([*survived(fault, outcomes)]))


@pytest.mark.slow
@pytest.mark.parametrize("fault", faults.MODELS)
def test_every_fault_around_a_small_model_is_found(
    npu_ranks: RankPool, tmp_path: Path, fault: str
) -> None:
    [said] = npu_ranks.run(1, failures_of_the_model, tmp_path, fault)
    assert said


def examine() -> tuple[int, list[str]]:
    """Returns the number of checks, and the sentences of those that fail."""
    from glm3cli.config.doctor import DoctorConfig
    from glm3cli.numerics.run import run_numerics

    report = run_numerics(DoctorConfig(numerics=True, device="npu"), lambda _: None)
    return len(report.outcomes), [one.sentence for one in report.failures]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_without_a_fault_all_is_well(npu_ranks: RankPool, ranks: int) -> None:
    for count, failures in npu_ranks.run(ranks, examine):
        assert "\n".join(failures) == ""
        assert count > 80
