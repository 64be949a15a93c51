"""Which parameters of a test are left to the slow tests: those whose kind others show, too."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Returns the values of a test's parameter, all but the `quick` ones marked as slow."""
    given = list(values)
    unknown = [one for one in quick if one not in given]
    assert not unknown, f"there is no {unknown}"
    return [one if one in quick else pytest.param(one, marks=pytest.mark.slow) for one in given]
