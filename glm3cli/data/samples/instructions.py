"""Builds samples of instructions: every document, or every pack of documents, is one sample."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from glm3cli.data.kinds import ANSWERS, INSTRUCTION_KEYS, WEIGHTS_KEY, DataKind
from glm3cli.data.packs import best_fit_decreasing, sample_sizes
from glm3cli.data.samples.fitting import trainable
from glm3cli.data.samples.order import GroupedByLength, blend, whole_windows
from glm3cli.data.samples.spec import (
    AGAIN,
    Dataset,
    DataSpec,
    Sample,
    VariedDataset,
    open_tokens,
)
from glm3cli.data.samples.splits import document_ranges
from glm3cli.data.tokens.messages import IGNORED_LABEL
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError


def build_instruction(spec: DataSpec, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """Builds samples of instructions.

    The arguments and the result are those of `datasets.build_samples`.

    Raises:
        DataError: A split has no document, a file is damaged, or the three file pairs of a data set
            don't belong together.
    """
    return build_documents(spec, ANSWERS, InstructionDataset)


def build_documents(
    spec: DataSpec, kind: DataKind, dataset: "type[InstructionDataset]"
) -> tuple[VariedDataset, VariedDataset | None]:
    """Builds samples of data whose documents are samples.

    Args:
        spec: The data and the number of samples.
        kind: The kind of data.
        dataset: The class of the samples of a single data set.

    Returns:
        The training samples, and the validation samples or None if `spec` asks for none.

    Raises:
        DataError: A split has no document, a file is damaged, or the three file pairs of a data set
            don't belong together.
    """
    pairs = [_train_and_valid(prefix, spec, kind, dataset) for prefix in spec.blend.prefixes]
    weights = spec.blend.weights or tuple(float(len(train)) for train, _ in pairs)
    parts = [train for train, _ in pairs]
    train: VariedDataset
    if spec.group_size is None:
        train = blend(parts, weights, spec.num_train)
    else:
        size = whole_windows(spec.num_train, spec.group_size)
        train = GroupedByLength(blend(parts, weights, size), size, spec.group_size, spec.seed)
    if not spec.num_valid:
        return train, None
    return train, blend([valid for _, valid in pairs], weights, spec.num_valid)


def _train_and_valid(
    prefix: str, spec: DataSpec, kind: DataKind, dataset: "type[InstructionDataset]"
) -> tuple["InstructionDataset", "InstructionDataset"]:
    """Builds the training and validation samples of one data set and checks its files.

    Raises:
        DataError: A split has no document with a token to train, or the three file pairs don't
            belong together.
    """
    files = {key: open_tokens(kind.key_file(prefix, key)) for key in INSTRUCTION_KEYS}
    sizes = {key: len(file) for key, file in files.items()}
    if len(set(sizes.values())) != 1:
        raise DataError(
            f"--data {prefix}: its files have different numbers of samples: {sizes}", AGAIN
        )
    for key, named in {"labels": "labels", "attention_mask": "mask values"}.items():
        lengths = [files[name].sequence_lengths for name in ("input_ids", key)]
        if not np.array_equal(*lengths):
            first = int(np.flatnonzero(lengths[0] != lengths[1])[0])
            raise DataError(
                f"--data {prefix}: sample {first} has {lengths[0][first]} tokens but "
                f"{lengths[1][first]} {named}",
                AGAIN,
            )
    weights = kind.key_file(prefix, WEIGHTS_KEY)
    if weights in kind.present_files(prefix):
        files[WEIGHTS_KEY] = open_tokens(weights)
        if len(files[WEIGHTS_KEY]) != sizes["input_ids"]:
            raise DataError(f"--data {prefix}: the weights of its samples are of others", AGAIN)
    train, valid = document_ranges(
        sizes["input_ids"], spec.split, prefix, needs_valid=bool(spec.num_valid)
    )
    first = spec.group_size or 0
    length, checked = spec.seq_length, np.empty(0, dtype=np.int64)
    if spec.num_valid:
        checked = trainable(prefix, valid, length, "validation", kind)
    return (
        dataset(
            files, trainable(prefix, train, length, "training", kind), spec, longest_first=first
        ),
        dataset(files, checked, spec),
    )


class InstructionDataset:
    """Samples of instructions without end: every epoch is in a new random order.

    The order is ModelLink's: one RandomState(seed) shuffles the samples of one epoch after the
    other. A sample is a document or, packed, several documents, each cut to the sequence length.
    The length is that of one epoch.

    Attributes:
        documents: The numbers of the documents that the samples are taken from, in order, int64
            [number of them].
    """

    stride: ClassVar[int] = 1  # see `DataKind.stride`

    def __init__(
        self,
        files: Mapping[str, IndexedDataset],
        documents: np.ndarray,
        spec: DataSpec,
        *,
        longest_first: int = 0,
    ) -> None:
        """Packs the documents if `spec` says so, and reads none of them.

        Args:
            files: The file pairs of the data set, by the keys `INSTRUCTION_KEYS`, and by
                `WEIGHTS_KEY` if its samples have weights.
            documents: The numbers of the documents that the samples are taken from, int64 [number
                of them].
            spec: The sequence length, the seed, and whether to pack.
            longest_first: The number of longest samples with which the first epoch begins.
        """
        self.documents = documents
        self._files = files
        self._seq_length, self._weighting = spec.seq_length, spec.weighting
        lengths = files["input_ids"].sequence_lengths[documents]
        sizes = sample_sizes(lengths, spec.seq_length)
        self._packs = best_fit_decreasing(sizes, spec.seq_length) if spec.packing else None
        self._sizes = sizes
        if self._packs is not None:
            self._sizes = np.array([sizes[pack].sum() for pack in self._packs], dtype=np.int64)
        self._longest_first = longest_first
        self._random = np.random.RandomState(spec.seed)
        self._orders: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._sizes)

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        """Returns the number of positions of each of some samples, int64 [len(indices)]."""
        places = [self._place(index) for index in indices]
        return self._sizes[np.array(places, dtype=np.int64)]

    def locate(self, index: int) -> tuple[VariedDataset, int]:
        """Returns this dataset and the position."""
        return self, index

    def __getitem__(self, index: int) -> Sample:
        return joined([self.document(number) for number in self.pack(index)], self.stride)

    def pack(self, index: int) -> list[int]:
        """Returns the numbers of the documents of the sample that is read at a position."""
        place = self._place(index)
        pack = [place] if self._packs is None else self._packs[place]
        return [int(self.documents[number]) for number in pack]

    def _place(self, index: int) -> int:
        """Returns the number of the sample that is read at a position, among those of an epoch."""
        epoch, place = divmod(index, len(self))
        while len(self._orders) <= epoch:
            order = np.arange(len(self))
            self._random.shuffle(order)
            if not self._orders:
                order = self._with_longest_first(order)
            self._orders.append(order)
        return int(self._orders[epoch][place])

    def _with_longest_first(self, order: np.ndarray) -> np.ndarray:
        """Moves the longest samples of an order to its front, the longest first."""
        by_length = np.argsort(-self._sizes[order], kind="stable")
        places = by_length[: self._longest_first]
        return np.concatenate([order[places], np.delete(order, places)])

    def _weights_of(self, document: int) -> np.ndarray | None:
        """Returns the weight of each sample of a document; None if all weigh 1."""
        if WEIGHTS_KEY not in self._files:
            return None
        return np.asarray(self._files[WEIGHTS_KEY][document], dtype=np.int32).view(np.float32)

    def document(self, document: int) -> Sample:
        """Reads a document, of which each token is to predict the next one."""
        size = self._seq_length
        tokens, labels, segment_ids = (
            np.asarray(self._files[key][document], dtype=np.int64)
            for key in ("input_ids", "labels", "attention_mask")
        )
        labels, segment_ids = labels[1 : size + 1], segment_ids[:-1][:size]
        return {
            "tokens": tokens[:-1][:size],
            "segment_ids": segment_ids,
            "labels": np.where(labels == IGNORED_LABEL, 0, labels),
            "loss_mask": self._weighting.of(labels, segment_ids, self._weights_of(document)),
        }


def joined(parts: Sequence[Sample], stride: int) -> Sample:
    """Returns one sample made of several, whose segments are numbered through.

    Args:
        parts: The samples, each of which may have several segments itself.
        stride: The number whose multiples are added to the segment ids; see `DataKind.stride`.
    """
    sizes = [-(-int(part["segment_ids"].max(initial=0)) // stride) * stride for part in parts]
    before = np.cumsum([0, *sizes])
    for part, number in zip(parts, before[:-1], strict=True):
        part["segment_ids"] += number
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
