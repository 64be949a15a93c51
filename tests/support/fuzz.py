"""Runs checks on inputs that hypothesis draws, and makes the handlers that many of them call."""

from collections.abc import Callable
from functools import cache
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.test_handlers import handler


def check(examples: int, body: Callable[..., None], **strategies: st.SearchStrategy) -> None:
    """Runs a check on drawn inputs."""
    options = settings(
        max_examples=examples, suppress_health_check=list(HealthCheck), database=None
    )
    options(given(**strategies)(body))()


@cache
def templated(name: str, template: str) -> Any:
    return handler(name, **({"template": template} if template else {}))
