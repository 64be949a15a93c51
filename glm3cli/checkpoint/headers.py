"""Compares the tensors that a checkpoint's headers list with those that the model must have."""

import functools
import logging
import re
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
_QUANTISED = (
    "its weights are quantised, and glm3 reads unquantised ones",
    "take the model's fp16, bf16 or fp32 files; --quantize rounds them when they are loaded",
)
# What tensors that the model doesn't have tell about a checkpoint, and what to do.
_KINDS: list[tuple[str, str, str]] = [
    (
        r"prefix_encoder\.",
        "it has the prefix encoder of P-Tuning v2, which glm3 doesn't run",
        "take the model that was tuned, without the prefix; or tune it anew with --lora-rank",
    ),
    (
        r"(weight_scale(_inv)?|weight_packed|qweight|qzeros|scales|g_idx|absmax|quant_map|SCB|"
        r"weight_format|weight_offset)$",
        *_QUANTISED,
    ),
    (
        r"(lora_[AB]\.|lora_embedding_|\.base_layer\.)",
        "it has an adapter beside the weights",
        "merge it by the program that has trained it, or save it in PEFT's layout and give --lora",
    ),
    (
        r"(^|\.)(score|v_head|rm_head|q_head|classification_head|summary)\.",
        "it has a head that scores or classifies, in place of the output layer or beside it",
        "take a model that predicts tokens",
    ),
    (
        r"(^|\.)(vision|visual|image)",
        "it has a tower that sees images, which glm3 doesn't run",
        "take a model of texts alone",
    ),
]
_log = logging.getLogger(__name__)


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
        kind: Whether the tensor is missing, isn't known, has a wrong shape or type, or has numbers
            of one byte.
        name: The tensor's name in the checkpoint's layout.
        sentence: The problem as it is shown to the user.
    """

    kind: Literal["missing", "unknown", "wrong", "quantised"]
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
        elif kept_dtype(header.dtype) not in TORCH_DTYPES.values():
            sentence = f"{name}{place} is {header.dtype}; expected fp32, bf16 or fp16"
            kind: Literal["wrong", "quantised"] = (
                "quantised" if header.dtype.itemsize == 1 else "wrong"
            )
            problems.append(TensorProblem(kind, name, sentence))
        elif header.shape != expected[name]:
            sentence = f"wrong shape of {name}{place}: expected {list(expected[name])}, got {shape}"
            problems.append(TensorProblem("wrong", name, sentence))
    return problems


def without_padding(
    path: Path, rows: int, found: Mapping[str, Header], names: Iterable[str], tp: int = 1
) -> dict[str, Header]:
    """Returns headers in which embedding and output layer have no rows beyond the vocabulary.

    Megatron pads both to a round number, with rows that stand for no token.

    Args:
        path: The checkpoint, for the log.
        rows: The size of the model's vocabulary.
        found: The headers of all tensors, by name.
        names: The names of those that have a row for each token.
        tp: The number of ranks over which the rows are cut.
    """
    headers = dict(found)
    for name in names:
        header = found.get(name)
        if header is not None and header.shape and header.shape[0] * tp > rows:
            headers[name] = Header((rows // tp, *header.shape[1:]), header.dtype)
            _warn_of_padding(path, header.shape[0] * tp, rows)
    return headers


@functools.lru_cache(maxsize=16)
def _warn_of_padding(path: Path, found: int, rows: int) -> None:
    """Logs that rows are left out, once for all tensors and files of a checkpoint."""
    _log.warning(
        "%s has embeddings of %s tokens, of which the %s of the model's vocabulary are read",
        path,
        f"{found:,}",
        f"{rows:,}",
    )


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
    found = list(problems)
    sentences = [problem.sentence for problem in found]
    if not sentences:
        return
    for pattern, reason, way_out in _KINDS:
        names = [p.name for p in found if p.kind == "unknown" and re.search(pattern, p.name)]
        if names:
            raise CheckpointError(f"{path}: {reason} ({names[0]})", way_out)
    quantised = [problem.sentence for problem in found if problem.kind == "quantised"]
    if quantised:
        reason, way_out = _QUANTISED
        raise CheckpointError(f"{path}: {reason} ({quantised[0]})", way_out)
    more = f"; and {len(sentences) - _SHOWN} more" if len(sentences) > _SHOWN else ""
    raise CheckpointError(
        f"{path}: {'; '.join(sentences[:_SHOWN])}{more}",
        "take the config.json and all files that belong to these weights",
    )
