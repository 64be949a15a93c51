"""Compares the tensors that a checkpoint's headers list with those that the model must have."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from glm3cli.checkpoint.names import is_ignored
from glm3cli.device.dtypes import TORCH_DTYPES
from glm3cli.errors import CheckpointError

Shape = tuple[int, ...]
_SHOWN = 5


@dataclass(frozen=True)
class Header:
    """What is known of a stored tensor without reading its values.

    Attributes:
        shape: The tensor's shape.
        dtype: The type of its values.
    """

    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class TensorProblem:
    """One thing that is wrong with a checkpoint's tensors.

    Attributes:
        kind: Whether the tensor is missing, isn't known, or has a wrong shape or type.
        name: The tensor's name in the checkpoint's layout.
        sentence: The problem as it is shown to the user.
    """

    kind: Literal["missing", "unknown", "wrong"]
    name: str
    sentence: str


def compare(
    expected: Mapping[str, Shape], found: Mapping[str, Header], where: str = ""
) -> list[TensorProblem]:
    """Returns a problem for each tensor that is missing, unknown, or of a wrong shape or type.

    Args:
        expected: The shapes that the model's tensors must have, by name.
        found: The headers of the tensors that are there, by name.
        where: The part of the checkpoint that was examined, for the sentences.
    """
    place = f" in {where}" if where else ""
    problems = [
        TensorProblem(
            "missing", name, f"missing tensor {name}{place}, expected shape {list(shape)}"
        )
        for name, shape in expected.items()
        if name not in found
    ]
    for name, header in found.items():
        if is_ignored(name):
            continue
        shape = list(header.shape)
        if name not in expected:
            sentence = f"unknown source key {name} of shape {shape}{place}"
            problems.append(TensorProblem("unknown", name, sentence))
        elif header.shape != expected[name]:
            sentence = f"wrong shape of {name}{place}: expected {list(expected[name])}, got {shape}"
            problems.append(TensorProblem("wrong", name, sentence))
        elif kept_dtype(header.dtype) not in TORCH_DTYPES.values():
            sentence = f"{name}{place} is {header.dtype}; expected fp32, bf16 or fp16"
            problems.append(TensorProblem("wrong", name, sentence))
    return problems


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the type in which tensors of a stored type are read: fp32 for fp64, else the same."""
    return torch.float32 if dtype is torch.float64 else dtype


def in_fp32(tensor: Tensor) -> Tensor:
    """Returns a tensor in fp32 if it is stored in fp64, else as it is."""
    return tensor.float() if tensor.dtype is torch.float64 else tensor


def refuse(path: Path, problems: Iterable[TensorProblem]) -> None:
    """Raises an error if there is any problem.

    Args:
        path: The checkpoint, for the message.
        problems: What is wrong with its tensors.

    Raises:
        CheckpointError: There are problems; the message has the first ones and the number of the
            others.
    """
    sentences = [problem.sentence for problem in problems]
    if not sentences:
        return
    more = f"; and {len(sentences) - _SHOWN} more" if len(sentences) > _SHOWN else ""
    raise CheckpointError(
        f"{path}: {'; '.join(sentences[:_SHOWN])}{more}",
        "take the config.json and all files that belong to these weights",
    )
