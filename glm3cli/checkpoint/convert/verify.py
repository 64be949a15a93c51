"""Verifies a conversion: opens the new folder as any model, and compares it with the source.

Every tensor is read back (see `read_back`). Of a small model the logits on a fixed prompt are
computed, too, from the source and from the new folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glm3cli.checkpoint.adapter.pairs import Adapter
from glm3cli.checkpoint.convert.read_back import ReadBack
from glm3cli.checkpoint.convert.report import Report
from glm3cli.checkpoint.convert.transfer import Transfer
from glm3cli.checkpoint.convert.verify_glm import verify_files, verify_logits
from glm3cli.checkpoint.files.digests import Follower
from glm3cli.checkpoint.layouts.companions import tokenizer_of
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.checkpoint.names import WEIGHTS, Layout, Weight
from glm3cli.checkpoint.source import StoredSource
from glm3cli.config.model import ModelConfig
from glm3cli.errors import CheckpointError
from glm3cli.model.plain import plain_logits

# The logits of such a model take about a second on two cores.
_MOST_PARAMETERS = 500_000_000
_LIBRARY_BYTES = 300_000_000  # of transformers and a tokenizer of 65,000 pieces
_PROMPT_LENGTH = 16
_STEP = 7919  # a prime, so that the prompt is spread over any vocabulary
_BY_NAME = {weight.logical: weight for weight in WEIGHTS}


@dataclass(frozen=True)
class Verification:
    """What the verification of a new folder found.

    Attributes:
        file_digests: The SHA-256 of the files of weights, as they were read back, by their paths.
        logits_difference: Largest absolute difference between the logits of the source (with the
            adapter) and of the new folder; None if they weren't computed.
    """

    file_digests: dict[Path, str]
    logits_difference: float | None


def verify(
    layout: Layout,
    folder: Path,
    target: Path,
    transfer: Transfer,
    follower: Follower,
    read_back: ReadBack,
    report: Report,
) -> Verification:
    """Compares the new folder with what was to be written.

    Args:
        layout: The layout of the new folder.
        folder: The new folder, complete but for its manifest.
        target: The name that it is going to have, for messages.
        transfer: What was written into it.
        follower: Has hashed the files of weights while they were written.
        read_back: Has begun to read the tensors back.
        report: Called with the progress, as "verifying".

    Raises:
        CheckpointError: A tensor is missing or isn't what was to be written, or the new folder
            computes other logits than the source.
    """
    if layout == "glm":
        verify_files(folder, target, transfer.plan.model, tokenizer_of(transfer.source.path))
    written = open_source(folder)
    hashed = follower.finish(written.files())
    read_back.finish(report)
    difference = _compare_logits(written, target, transfer)
    # NaN and infinite values don't come through two forward passes alike.
    if layout == "glm" and is_small(written) and not transfer.non_finite:
        expected = _logits(written.model, written.read)
        verify_logits(folder, target, _prompt(written.model), expected, transfer.memory)
    return Verification(hashed.result(), difference)


def _compare_logits(written: StoredSource, target: Path, transfer: Transfer) -> float | None:
    """Returns the difference between the logits of the source and of the new folder.

    Raises:
        CheckpointError: They differ, though all weights have kept their types and values.
    """
    source = transfer.source
    if not is_small(source):
        return None
    difference = logits_difference(source, transfer.adapter, written)
    kept = all(source.dtype(*slot) == dtype for slot, dtype in transfer.plan.dtypes.items())
    if difference and kept and not transfer.adapter.pairs:
        raise CheckpointError(
            f"{target} computes other logits than the source (by {difference:.2e})",
            "this is a bug of glm3: please report it; nothing was kept",
        )
    return difference


def is_small(source: StoredSource) -> bool:
    """Says whether a model is so small that computing its logits takes about a second at most."""
    return source.model.num_parameters <= _MOST_PARAMETERS


def loaded_bytes(source: StoredSource) -> int:
    """Estimates the memory that transformers takes to verify a folder in the glm layout, in bytes.

    Args:
        source: The weights that are converted.
    """
    weights = 4 * source.model.num_parameters if is_small(source) else 0  # in fp32
    return _LIBRARY_BYTES + weights


def logits_difference(source: StoredSource, adapter: Adapter, written: StoredSource) -> float:
    """Returns the largest absolute difference between two models' logits on a fixed prompt.

    Both are computed in fp32 by the same operations. So the difference is 0 unless the type of the
    weights was changed, which rounds them, or an adapter was merged, whose sum with the weights is
    rounded to their type.

    Args:
        source: The weights that were converted.
        adapter: The adapter that was merged into them.
        written: The new weights.
    """

    def adapted(weight: Weight, layer: int | None) -> Tensor:
        return adapter.merge(weight, layer, source.read(weight, layer))

    source.cat = written.cat = torch.cat  # several weights are needed at a time
    difference = _logits(source.model, adapted) - _logits(written.model, written.read)
    return float(difference.abs().max())


def _logits(model: ModelConfig, read: Callable[[Weight, int | None], Tensor]) -> Tensor:
    """Returns the logits on the fixed prompt, [tokens, vocabulary] in fp32, with 0 for NaN."""
    logits = plain_logits(model, lambda name, layer: read(_BY_NAME[name], layer), _prompt(model))
    return logits.nan_to_num()


def _prompt(model: ModelConfig) -> Tensor:
    """Returns the token ids of the fixed prompt, [tokens]."""
    return torch.arange(_PROMPT_LENGTH) * _STEP % model.padded_vocab_size
