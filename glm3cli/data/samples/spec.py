"""What determines the samples of a training (`DataSpec`), and what a data set of samples is.

A sample is a dict of arrays of shape [s]: `tokens` and `labels` (int64), and `loss_mask` (float32),
the weight of each position in the loss, 0 where nothing is trained.
Texts are all as long as `seq_length`. A sample of instructions is as long as it happens to be, at
most `seq_length`, and also has `segment_ids` (int64): the number, from 1, of the sample within its
pack that each position belongs to.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from glm3cli.data.prefixes import Blend
from glm3cli.data.samples.weighting import Weighting
from glm3cli.errors import DataError

Sample = dict[str, np.ndarray]
AGAIN = "run `glm3 preprocess` again"


class Dataset(Protocol):
    """A sequence of samples that can be read in any order."""

    def __len__(self) -> int:
        """Returns the number of samples."""

    def __getitem__(self, index: int) -> Sample:
        """Returns the sample at an index."""


@runtime_checkable
class VariedDataset(Dataset, Protocol):
    """A dataset whose samples have different lengths, which it knows without reading them."""

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        """Returns the number of positions of each of some samples, int64 [len(indices)]."""

    def locate(self, index: int) -> "tuple[VariedDataset, int]":
        """Returns the single dataset that a sample comes from, and its position there.

        A dataset that mixes or reorders others finds the sample among them.
        """


class SampleOptions(Protocol):
    """The options that determine samples; the configs of training and preprocess both have them."""

    @property
    def split(self) -> str:
        """The proportions of training, validation and test documents, such as "949,50,1"."""

    @property
    def seed(self) -> int:
        """The seed of the random order of the samples."""

    @property
    def global_batch_size(self) -> int:
        """The number of samples of one optimizer step."""

    @property
    def eval_interval(self) -> int | None:
        """The number of steps from one validation to the next; None for no validation."""

    @property
    def eval_iters(self) -> int:
        """The number of global batches of one validation."""


class InstructionOptions(SampleOptions, Protocol):
    """The further options that determine samples of instructions."""

    @property
    def packing(self) -> bool:
        """Whether several samples share a sequence."""

    @property
    def group_by_length(self) -> bool:
        """Whether a step takes samples of similar lengths."""

    @property
    def loss_average(self) -> Literal["token", "sample"]:
        """What weighs the same in a step: every trained token, or every sample."""

    @property
    def last_turn_only(self) -> bool:
        """Whether the last answer of a sample is trained alone."""


@dataclass(frozen=True)
class DataSpec:
    """Everything that determines the samples of a training, besides the kind of data.

    Attributes:
        blend: The data sets and their weights.
        split: The proportions of training, validation and test documents, such as "949,50,1".
        seq_length: The length of a sample, in tokens.
        seed: The seed of the random order.
        num_train: The number of training samples.
        num_valid: The number of samples of one validation, which every validation reads from the
            start; 0 builds no validation samples.
        packing: Whether several samples of instructions share a sequence.
        group_size: For samples of instructions that are grouped by length: the number of samples of
            a step. None keeps the random order.
        weighting: How much each token of a sample of instructions weighs in the loss.
    """

    blend: Blend
    split: str
    seq_length: int
    seed: int
    num_train: int
    num_valid: int
    packing: bool = False
    group_size: int | None = None
    weighting: Weighting = field(default_factory=Weighting)

    @classmethod
    def of(cls, config: SampleOptions, blend: Blend, seq_length: int, steps: int) -> "DataSpec":
        """Returns the samples that `steps` optimizer steps and their validations read."""
        valid = config.eval_iters * config.global_batch_size if config.eval_interval else 0
        return cls(
            blend=blend,
            split=config.split,
            seq_length=seq_length,
            seed=config.seed,
            num_train=steps * config.global_batch_size,
            num_valid=valid,
        )

    def with_instructions(self, config: InstructionOptions) -> "DataSpec":
        """Returns the same with the options for samples of instructions."""
        return replace(
            self,
            packing=config.packing,
            group_size=config.global_batch_size if config.group_by_length else None,
            weighting=Weighting(config.loss_average, config.last_turn_only),
        )


def open_tokens(prefix: str) -> IndexedDataset:
    """Opens a pair of token files; raises DataError if it is empty or damaged."""
    num_bytes = Path(f"{prefix}.bin").stat().st_size
    if not num_bytes:
        raise DataError(f"--data {prefix}: {prefix}.bin holds no token", AGAIN)
    try:
        file = IndexedDataset(prefix)
    except (AssertionError, ValueError, OSError, struct.error) as error:
        raise DataError(f"--data {prefix}: {prefix}.idx is damaged ({error})", AGAIN) from error
    needed = int(file.sequence_lengths.sum(dtype=np.int64)) * file.index.dtype_size
    if num_bytes < needed:
        raise DataError(
            f"--data {prefix}: {prefix}.bin is damaged ({num_bytes:,} bytes instead of {needed:,})",
            AGAIN,
        )
    return file
