"""Registers the kernels, and says what all of them refuse."""

from collections.abc import Callable
from typing import Any

import torch

KERNELS: dict[str, Callable[..., Any]] = {}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    KERNELS[function.__name__] = function
    return function


def with_defaults(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `function` so that it gets every argument of the operator's schema by position.

    The dispatcher leaves out trailing arguments that have their default, and passes those after a
    star by name.
    """
    schema = getattr(torch.ops.npu, name).default._schema

    def call(*given: Any, **named: Any) -> Any:
        rest = schema.arguments[len(given) :]
        return function(*given, *(named.get(one.name, one.default_value) for one in rest))

    return call


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)
