"""Training samples: megatron-core's GPTDataset for text, and instruction samples of our own.

A sample is a dict of `tokens`, `labels` (both int64) and `loss_mask` (float32), each [seq_length];
those of instructions have `segment_ids` (int64), which count the samples of a pack from 1.
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
    """A sequence of samples that can be read at any place."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Sample:
        """One sample."""


class SampleOptions(Protocol):
    """What the configs of training and of preprocess tell alike of samples."""

    @property
    def split(self) -> str:
        """Proportions of training, validation, and test documents."""

    @property
    def seed(self) -> int:
        """Seed of the order."""

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step."""

    @property
    def eval_interval(self) -> int | None:
        """Steps between validations."""

    @property
    def eval_iters(self) -> int:
        """Batches of one validation."""


@dataclass(frozen=True)
class DataSpec:
    """What the samples are made of.

    Attributes:
        split: Proportions of training, validation, and test documents, "949,50,1".
        num_train: Samples that training takes.
        num_valid: Samples that all validations take together; 0 builds none.
    """

    blend: Blend
    split: str
    seq_length: int
    seed: int
    num_train: int
    num_valid: int

    @classmethod
    def of(cls, config: SampleOptions, blend: Blend, seq_length: int, steps: int) -> "DataSpec":
        """What `steps` optimizer steps and their validations read."""
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
    """Builds the training samples of a kind of data, and the validation samples if there are any.

    Raises:
        DataError: A split has no document, or a file is damaged.
    """
    build = {TEXT: build_text, ANSWERS: build_instruction}[kind]
    return build(spec, tokenizer)


def build_text(spec: DataSpec, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """Training and validation samples out of text documents, seq_length tokens each.

    Raises:
        DataError: A split has no document.
    """
    # Indices stay in memory, unless `preprocess --build-index` has built just these. As files
    # beside the data they would be taken even after the data was preprocessed again, and on a
    # machine whose disk isn't rank 0's they would be missing.
    folder = _index_folder(spec, tokenizer)
    return _build_text(spec, tokenizer, str(folder) if folder and folder.is_dir() else "")


def build_index(spec: DataSpec, tokenizer: Tokenizer) -> Path:
    """Builds the sample indices of one text file beside it, for trainings told the same.

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
    """Where built indices of a text file are; None for a blend, which has no one place."""
    if len(spec.blend.prefixes) > 1:
        return None
    told = {name: value for name, value in asdict(spec).items() if name != "blend"}
    told["tokenizer"] = tokenizer.unique_identifiers
    return index_folder(spec.blend.prefixes[0], told)


def _build_text(
    spec: DataSpec, tokenizer: Tokenizer, path_to_cache: str
) -> tuple[Dataset, Dataset | None]:
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
    # Only the splits that are read; the proportions, and so the training documents, stay.
    config.split_matrix[2] = None
    if not spec.num_valid:
        config.split_matrix[1] = None
    builder = BlendedMegatronDatasetBuilder(
        GPTDataset, [spec.num_train, spec.num_valid, 0], lambda: True, config
    )
    train, valid, _ = builder.build()
    return train, valid


def _text_blend(spec: DataSpec) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights; where none are given, the tokens of each part's training documents.

    Megatron-core's own choice without weights ends after one epoch.
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
    """Training and validation samples out of preprocessed instructions, one per sample.

    Raises:
        DataError: A split has no document, or the three files don't belong together.
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
    """Instruction samples, endlessly: every epoch in a new random order.

    The order is ModelLink's: one RandomState(seed) shuffles the documents of each epoch in turn.
    Samples are padded on the right, where causal attention never looks.
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
        cut = np.asarray(values[: self._seq_length], dtype=np.int64)
        return np.pad(cut, (0, self._seq_length - len(cut)), constant_values=filler)


class BlendedSamples:
    """Samples of several datasets in fixed proportions, by megatron-core's blending index."""

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
    """`num_samples` samples of `datasets` in the proportion of `weights`."""
    if len(datasets) == 1:
        return datasets[0]
    return BlendedSamples(datasets, weights, num_samples)


def consumed_by_part(dataset: Dataset, num_parts: int, consumed: int) -> list[int]:
    """How many of the first `consumed` samples of a blend each of its parts has given."""
    if num_parts == 1:
        return [consumed]
    # Of megatron-core's BlendedDataset as of ours: the part that each sample comes from.
    index: np.ndarray = getattr(dataset, "dataset_index")  # noqa: B009
    return np.bincount(index[:consumed], minlength=num_parts).tolist()
