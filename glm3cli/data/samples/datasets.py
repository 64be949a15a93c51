"""Builds the training samples: megatron-core's GPTDataset for text, our own class for instructions.

A sample is a dict of arrays of shape [seq_length]: `tokens` and `labels` (int64) and `loss_mask`
(float32). A sample of instructions also has `segment_ids` (int64): the number, from 1, of the
sample within its pack that each position belongs to, and 0 for padding.
"""

import logging
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from glm3cli.data.index_cache import index_folder
from glm3cli.data.kinds import ANSWERS, INSTRUCTION_KEYS, TEXT, DataKind, instruction_file
from glm3cli.data.prefixes import Blend
from glm3cli.data.samples.splits import document_ranges
from glm3cli.data.tokens.chat import IGNORED_LABEL
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError

Sample = dict[str, np.ndarray]
_AGAIN = "run `glm3 preprocess` again"


class Dataset(Protocol):
    """A sequence of samples that can be read in any order."""

    def __len__(self) -> int:
        """Returns the number of samples."""

    def __getitem__(self, index: int) -> Sample:
        """Returns the sample at an index."""


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
    """

    blend: Blend
    split: str
    seq_length: int
    seed: int
    num_train: int
    num_valid: int

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


def build_samples(
    kind: DataKind, spec: DataSpec, tokenizer: Tokenizer
) -> tuple[Dataset, Dataset | None]:
    """Builds the samples of a training.

    Args:
        kind: The kind of data, which decides how samples are made of documents.
        spec: The data and the number of samples.
        tokenizer: The tokenizer of the data.

    Returns:
        The training samples, and the validation samples or None if `spec` asks for none.

    Raises:
        DataError: A split has no document, or a file is damaged.
    """
    build = {TEXT: build_text, ANSWERS: build_instruction}[kind]
    return build(spec, tokenizer)


def build_text(spec: DataSpec, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """Builds samples of text: the documents are joined in random order and cut to `seq_length`.

    The arguments and the result are those of `build_samples`.

    Raises:
        DataError: A split has no document, or a file is damaged.
    """
    # The indices stay in memory unless `preprocess --build-index` has built exactly these. If
    # megatron-core wrote them beside the data, it would read them even after the data was
    # preprocessed again, and they would be missing on a machine with another disk than rank 0's.
    folder = _index_folder(spec, tokenizer)
    return _build_text(spec, tokenizer, str(folder) if folder and folder.is_dir() else "")


def build_index(spec: DataSpec, tokenizer: Tokenizer) -> Path:
    """Builds the sample indices of one text data set beside it, for trainings of equal options.

    Args:
        spec: The data, a single data set, and the number of samples.
        tokenizer: The tokenizer of the data.

    Returns:
        The folder of the indices, which is left alone if it exists.

    Raises:
        DataError: A split has no document.
    """
    folder = _index_folder(spec, tokenizer)
    assert folder is not None, "a blend has no indices of its own"
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _build_text(spec, tokenizer, str(partial))
        partial.rename(folder)
    return folder


def _index_folder(spec: DataSpec, tokenizer: Tokenizer) -> Path | None:
    """Returns the folder for indices of a text data set; None for a blend of several."""
    if len(spec.blend.prefixes) > 1:
        return None
    settings = {name: value for name, value in asdict(spec).items() if name != "blend"}
    settings["tokenizer"] = tokenizer.unique_identifiers
    return index_folder(spec.blend.prefixes[0], settings)


def _build_text(
    spec: DataSpec, tokenizer: Tokenizer, path_to_cache: str
) -> tuple[Dataset, Dataset | None]:
    """Builds samples of text with indices in the folder `path_to_cache`, or in memory for ""."""
    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)
    config = GPTDatasetConfig(
        random_seed=spec.seed,
        sequence_length=spec.seq_length,
        blend=_text_blend(spec),
        split=spec.split,
        path_to_cache=path_to_cache,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # Build only the splits that are read; the others' proportions still count.
    config.split_matrix[2] = None
    if not spec.num_valid:
        config.split_matrix[1] = None
    builder = BlendedMegatronDatasetBuilder(
        GPTDataset, [spec.num_train, spec.num_valid, 0], lambda: True, config
    )
    train, valid, _ = builder.build()
    return train, valid


def _text_blend(spec: DataSpec) -> tuple[list[str], list[float] | None]:
    """Returns the prefixes and weights of a blend of texts in the form that megatron-core takes.

    Weights that aren't given are the numbers of training tokens: without weights megatron-core's
    own samples end after one epoch.
    """
    num_tokens = []
    for prefix in spec.blend.prefixes:
        file = _open(prefix)
        train, _ = document_ranges(len(file), spec.split, prefix, needs_valid=bool(spec.num_valid))
        num_tokens.append(float(file.sequence_lengths[train.start : train.stop].sum()))
    prefixes = [str(Path(prefix).absolute()) for prefix in spec.blend.prefixes]
    if len(prefixes) == 1:
        return prefixes, None
    return prefixes, list(spec.blend.weights or num_tokens)


def build_instruction(spec: DataSpec, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """Builds samples of instructions: every document is one sample.

    The arguments and the result are those of `build_samples`.

    Raises:
        DataError: A split has no document, a file is damaged, or the three file pairs of a data set
            don't belong together.
    """
    pairs = [_instruction_pair(prefix, spec, tokenizer.pad_id) for prefix in spec.blend.prefixes]
    weights = spec.blend.weights or tuple(float(len(train.documents)) for train, _ in pairs)
    train = blend([pair[0] for pair in pairs], weights, spec.num_train)
    if not spec.num_valid:
        return train, None
    return train, blend([pair[1] for pair in pairs], weights, spec.num_valid)


def _instruction_pair(
    prefix: str, spec: DataSpec, pad_id: int
) -> tuple["InstructionDataset", "InstructionDataset"]:
    """Builds the training and validation samples of one data set and checks its files.

    Raises:
        DataError: A split has no document, or the three file pairs don't belong together.
    """
    files = {key: _open(instruction_file(prefix, key)) for key in INSTRUCTION_KEYS}
    sizes = {key: len(file) for key, file in files.items()}
    if len(set(sizes.values())) != 1:
        raise DataError(
            f"--data {prefix}: its files have different numbers of samples: {sizes}", _AGAIN
        )
    for key, named in {"labels": "labels", "attention_mask": "mask values"}.items():
        lengths = [files[name].sequence_lengths for name in ("input_ids", key)]
        if not np.array_equal(*lengths):
            first = int(np.flatnonzero(lengths[0] != lengths[1])[0])
            raise DataError(
                f"--data {prefix}: sample {first} has {lengths[0][first]} tokens but "
                f"{lengths[1][first]} {named}",
                _AGAIN,
            )
    train, valid = document_ranges(
        sizes["input_ids"], spec.split, prefix, needs_valid=bool(spec.num_valid)
    )
    return (
        InstructionDataset(files, train, spec.seq_length, spec.seed, pad_id),
        InstructionDataset(files, valid, spec.seq_length, spec.seed, pad_id),
    )


def _open(prefix: str) -> IndexedDataset:
    """Opens a pair of token files; raises DataError if it is empty or damaged."""
    num_bytes = Path(f"{prefix}.bin").stat().st_size
    if not num_bytes:
        raise DataError(f"--data {prefix}: {prefix}.bin holds no token", _AGAIN)
    try:
        file = IndexedDataset(prefix)
    except (AssertionError, ValueError, OSError, struct.error) as error:
        raise DataError(f"--data {prefix}: {prefix}.idx is damaged ({error})", _AGAIN) from error
    needed = int(file.sequence_lengths.sum(dtype=np.int64)) * file.index.dtype_size
    if num_bytes < needed:
        raise DataError(
            f"--data {prefix}: {prefix}.bin is damaged ({num_bytes:,} bytes instead of {needed:,})",
            _AGAIN,
        )
    return file


class InstructionDataset:
    """Samples of instructions without end: every epoch is in a new random order.

    The order is ModelLink's: one RandomState(seed) shuffles the documents of one epoch after the
    other. Samples are padded on the right, which causal attention doesn't read. The length is that
    of one epoch.

    Attributes:
        documents: The numbers of the documents that the samples are taken from.
    """

    def __init__(
        self,
        files: Mapping[str, IndexedDataset],
        documents: range,
        seq_length: int,
        seed: int,
        pad_id: int,
    ) -> None:
        self.documents = documents
        self._files = files
        self._seq_length, self._pad_id = seq_length, pad_id
        self._random = np.random.RandomState(seed)
        self._orders: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Sample:
        epoch, place = divmod(index, len(self.documents))
        while len(self._orders) <= epoch:
            order = np.arange(self.documents.start, self.documents.stop)
            self._random.shuffle(order)
            self._orders.append(order)
        document = int(self._orders[epoch][place])
        tokens = self._padded(self._files["input_ids"][document][:-1], self._pad_id)
        labels = self._padded(self._files["labels"][document][1:], IGNORED_LABEL)
        segment_ids = self._padded(self._files["attention_mask"][document][:-1], 0)
        mask = labels != IGNORED_LABEL
        return {
            "tokens": tokens,
            "segment_ids": segment_ids,
            "labels": np.where(mask, labels, 0),
            "loss_mask": mask.astype(np.float32),
        }

    def _padded(self, values: np.ndarray, filler: int) -> np.ndarray:
        """Cuts or pads values to the sequence length, as int64 [seq_length]."""
        cut = np.asarray(values[: self._seq_length], dtype=np.int64)
        return np.pad(cut, (0, self._seq_length - len(cut)), constant_values=filler)


class BlendedSamples:
    """Samples of several datasets in fixed proportions, in the order of megatron-core's blending.

    Attributes:
        dataset_index: The number of the dataset that each sample is from, int16 [num_samples];
            megatron-core's BlendedDataset has the same attribute.
    """

    def __init__(
        self, datasets: Sequence[Dataset], weights: Sequence[float], num_samples: int
    ) -> None:
        self._datasets = datasets
        self.dataset_index = np.zeros(num_samples, dtype=np.int16)
        self._place = np.zeros(num_samples, dtype=np.int64)
        shares = np.array(weights, dtype=np.float64) / sum(weights)
        helpers.build_blending_indices(
            self.dataset_index, self._place, shares, len(datasets), num_samples, False
        )

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> Sample:
        return self._datasets[self.dataset_index[index]][int(self._place[index])]


def blend(datasets: Sequence[Any], weights: Sequence[float], num_samples: int) -> Dataset:
    """Mixes datasets.

    Args:
        datasets: The datasets; a single one is returned as it is.
        weights: The relative share of each dataset in the samples.
        num_samples: The number of samples of the result.
    """
    if len(datasets) == 1:
        return datasets[0]
    return BlendedSamples(datasets, weights, num_samples)


def consumed_by_part(dataset: Dataset, num_parts: int, consumed: int) -> list[int]:
    """Returns how many of the first samples of a blend come from each of its datasets.

    Args:
        dataset: The blend: ours, or megatron-core's BlendedDataset.
        num_parts: The number of its datasets.
        consumed: The number of first samples to count.
    """
    if num_parts == 1:
        return [consumed]
    # An attribute of both classes, but not of the protocol, since a single dataset lacks it.
    index: np.ndarray = getattr(dataset, "dataset_index")  # noqa: B009
    return np.bincount(index[:consumed], minlength=num_parts).tolist()
