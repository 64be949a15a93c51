"""Cuts the samples of each optimizer step into the micro-batches of this rank.

Step k of a run takes the samples [k * global_batch_size, (k + 1) * global_batch_size), whatever the
parallel sizes are. So the position in the data is one number, and the loss doesn't depend on data
parallelism.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glm3cli.data.samples.order import consumed_by_part, source_index
from glm3cli.data.samples.padding import Padding
from glm3cli.data.samples.preferences import MismatchedSamples
from glm3cli.data.samples.segments import Segments
from glm3cli.data.samples.spec import Dataset, Sample, VariedDataset
from glm3cli.errors import DataError

# Losses are computed of a multiple of so many places: matrix units take blocks of 16 rows.
_MULTIPLE = 16
# Above this share all are computed: choosing rows costs a pass over the hidden states.
_MOST_NEEDED = 0.9


@dataclass(frozen=True)
class Batch:
    """One micro-batch of b sequences.

    With context parallelism, s below is the number of this rank's positions, a part of the S
    positions of the whole sequence.

    Attributes:
        tokens: The token ids, int64 [b, s].
        labels: The id that each position is to predict, int64 [b, s]; arbitrary where `loss_mask`
            is 0.
        loss_mask: The weight of each position in the loss, 0 for none, float32 [b, s].
        segment_ids: The number, from 1, of the sample within its pack that each position belongs
            to, and 0 for padding, int64 [b, S]; None if causal attention needs none: no sequence is
            a pack of several samples, or has padding in front.
        sources: The name of the data set that each sample is from; empty where there is one.
        places: For random numbers that depend on the position, a number for each position that no
            other one of the run has, int64 [b, s]; None where there are no such numbers.
        scales: The largest size of each position's noise, 0 for padding, float32 [b, s].
        reference: For answers that are compared with a reference: its log-probability of an answer
            at one of the answer's positions, else 0, float32 [b, s]; None where none is known.
        needed: The places in a tensor of [s, b], counted from 0 in rising order, whose losses are
            needed, int64 [n]; the others' `loss_mask` is 0. None needs all.
        segments: What the host knows of the segments, so that nobody need read it from the device;
            None where the samples have none.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    segment_ids: Tensor | None = None
    sources: tuple[str, ...] = ()
    places: Tensor | None = None
    scales: Tensor | None = None
    reference: Tensor | None = None
    needed: Tensor | None = None
    segments: Segments | None = None


@dataclass(frozen=True)
class StepSize:
    """The size of the global batch of a step, over all ranks.

    Attributes:
        tokens: The number of tokens, padding among them.
        unpadded: The number of tokens without padding.
        squares: The sum over all sequences of the square of their padded length, by which the
            operations of attention go.
    """

    tokens: int
    unpadded: int
    squares: int


@dataclass
class Tally:
    """The tokens of the first samples, kept so that each is counted once.

    Attributes:
        counted: The number of samples that are counted.
        tokens: Their tokens without padding, by data set; empty before the first are counted.
    """

    counted: int = 0
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Loader:
    """Cuts the samples of a step into the micro-batches of this data parallel rank.

    Attributes:
        dataset: The samples.
        seq_length: The largest number of tokens of a sample; all have it unless the dataset is a
            `VariedDataset`.
        micro_batch_size: The number of samples of a micro-batch.
        global_batch_size: The number of samples of an optimizer step, over all ranks.
        dp_rank: The data parallel rank of this process.
        dp_size: The data parallel size.
        vocab_size: The number of rows of the embedding; a token id beyond them is reported here
            before it crashes a kernel.
        device: The device that the batches are copied to.
        cp_rank: The context parallel rank of this process.
        cp_size: The context parallel size; each rank gets an equal contiguous part of a sequence.
        sources: The prefixes of the data sets that the samples come from.
        padding: How samples of different lengths become one micro-batch.
        noise: The size of the noise on the embeddings of a sample of one token; None for no noise.
        has_places: Whether the batches have places; with noise they always do.
        needs_all: Whether all losses are needed, also those of tokens that aren't trained.
    """

    dataset: Dataset
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    dp_rank: int
    dp_size: int
    vocab_size: int
    device: torch.device
    cp_rank: int = 0
    cp_size: int = 1
    sources: tuple[str, ...] = ("",)
    padding: Padding = field(default_factory=Padding)
    noise: float | None = None
    has_places: bool = False
    needs_all: bool = False
    _tally: Tally = field(default_factory=Tally)

    def consumed_by_source(self, consumed: int) -> dict[str, dict[str, int]]:
        """Returns the samples, and their tokens without padding, that come from each of `sources`.

        Args:
            consumed: The number of first samples to count.
        """
        samples = consumed_by_part(self.dataset, len(self.sources), consumed)
        tokens = self._tokens_by_part(samples, consumed)
        total = {source: {"samples": 0, "tokens": 0} for source in self.sources}
        for source, number, size in zip(self.sources, samples, tokens, strict=True):
            total[source]["samples"] += number
            total[source]["tokens"] += size
        return total

    def _tokens_by_part(self, samples: list[int], consumed: int) -> list[int]:
        """Returns the tokens of the first samples by their places in `sources`.

        Args:
            samples: The numbers of these samples.
            consumed: The number of all of them.
        """
        if not isinstance(self.dataset, VariedDataset):
            return [number * self.seq_length for number in samples]
        tally = self._tally
        if consumed < tally.counted or not len(tally.tokens):  # a run that went back
            tally.counted, tally.tokens = 0, np.zeros(len(samples))
        new = range(tally.counted, consumed)
        parts = np.zeros(len(new), dtype=np.int64)
        if len(samples) > 1:
            parts = source_index(self.dataset)[new.start : new.stop]
        sizes = self.dataset.sizes(new)
        tally.tokens += np.bincount(parts, weights=sizes, minlength=len(samples))
        tally.counted = consumed
        return tally.tokens.astype(np.int64).tolist()

    def microbatches(self, consumed: int) -> Iterator[Batch]:
        """Yields this rank's micro-batches of one optimizer step.

        Args:
            consumed: The number of samples that all steps before it have taken, over all ranks.

        Raises:
            DataError: A token id is beyond the vocabulary.
        """
        for indices in self.indices(consumed, self.dp_rank):
            yield self._batch(indices)

    def lengths(self, consumed: int) -> list[int]:
        """Returns the length of each micro-batch of this rank in a step, without reading samples.

        It is that of the whole sequences, also where context parallel ranks share them.

        Args:
            consumed: The number of samples that all steps before it have taken, over all ranks.
        """
        return [self._length(self._sizes(rows)) for rows in self.indices(consumed, self.dp_rank)]

    def step_size(self, consumed: int) -> StepSize:
        """Returns the size of the global batch of a step, without reading its samples.

        Args:
            consumed: The number of samples that all steps before it have taken, over all ranks.
        """
        tokens = unpadded = squares = 0
        for dp_rank in range(self.dp_size):
            for indices in self.indices(consumed, dp_rank):
                sizes = self._sizes(indices)
                length = self._length(sizes)
                tokens += len(indices) * length
                unpadded += sum(sizes)
                squares += len(indices) * length**2
        return StepSize(tokens, unpadded, squares)

    def indices(self, consumed: int, dp_rank: int) -> list[range]:
        """Returns the positions of the samples of each micro-batch of a data parallel rank."""
        stride = self.micro_batch_size * self.dp_size
        first = consumed + dp_rank * self.micro_batch_size
        starts = range(first, first + self.global_batch_size, stride)
        return [range(start, start + self.micro_batch_size) for start in starts]

    def _sizes(self, indices: Sequence[int]) -> list[int]:
        """Returns the numbers of positions of samples."""
        if isinstance(self.dataset, VariedDataset):
            return self.dataset.sizes(indices).tolist()
        return [self.seq_length] * len(indices)

    def _length(self, sizes: list[int]) -> int:
        """Returns the length of a micro-batch of samples of these sizes."""
        return self.padding.length(sizes, self.seq_length)

    def mismatched(self) -> "Loader":
        """Returns the loader of the same prompts with other answers; see `MismatchedSamples`."""
        assert isinstance(self.dataset, VariedDataset), "texts have no answers"
        return replace(self, dataset=MismatchedSamples(self.dataset))

    def _batch(self, indices: range) -> Batch:
        """Reads the samples of one micro-batch."""
        samples = [self._with_places(index, self.dataset[index]) for index in indices]
        length = self._length([len(sample["tokens"]) for sample in samples])
        keys = ["tokens", "labels", "loss_mask"]
        keys += [key for key in ("places", "scales", "reference") if key in samples[0]]
        cut = tuple(keys)  # by context parallelism
        if any(
            int(sample["segment_ids"].max(initial=0)) > 1
            or (self.padding.side == "left" and len(sample["tokens"]) < length)
            for sample in samples
            if "segment_ids" in sample
        ):
            keys.append("segment_ids")
        tensors = {key: torch.from_numpy(self.padding.rows(samples, key, length)) for key in keys}
        largest = max(int(tensors["tokens"].max()), int(tensors["labels"].max()))
        if largest >= self.vocab_size:
            raise DataError(
                f"sample {indices.start} has token id {largest}, but the model's vocabulary has "
                f"{self.vocab_size} entries",
                "preprocess the data with this model's tokenizer",
            )
        loss_mask = tensors["loss_mask"].numpy()
        for key in cut:
            tensors[key] = tensors[key].chunk(self.cp_size, dim=1)[self.cp_rank].contiguous()
        needed = None if self.needs_all else needed_places(tensors["loss_mask"])
        if needed is not None:
            tensors["needed"] = needed
        on_device = {key: tensor.to(self.device) for key, tensor in tensors.items()}
        segments = None
        if "segment_ids" in samples[0]:
            segments = Segments.of(self.padding.rows(samples, "segment_ids", length), loss_mask)
        return Batch(**on_device, sources=self._sources_of(indices), segments=segments)

    def _with_places(self, index: int, sample: Sample) -> Sample:
        """Adds to a sample its places, and the scales of noise on the embeddings, if asked for.

        Args:
            index: The position of the sample in the stream of samples.
            sample: The sample.
        """
        places = index * self.seq_length + np.arange(len(sample["tokens"]))
        if self.noise is None:
            return {**sample, "places": places} if self.has_places else sample
        segments = sample["segment_ids"]
        _, number, counts = np.unique(segments, return_inverse=True, return_counts=True)
        scales = self.noise / np.sqrt(counts[number])
        return {**sample, "places": places, "scales": scales.astype(np.float32)}

    def _sources_of(self, indices: range) -> tuple[str, ...]:
        """Returns the name of the data set of each of some samples; empty where there is one."""
        if len(set(self.sources)) == 1:
            return ()
        names = source_names(self.sources)
        index = source_index(self.dataset)
        return tuple(names[index[place]] for place in indices)


def needed_places(loss_mask: Tensor) -> Tensor | None:
    """Returns the places whose losses are needed, as `Batch.needed` has them.

    Their number is a multiple of `_MULTIPLE`, with some places of weight 0 among them.

    Args:
        loss_mask: The weight of each position in the loss, [b, s].

    Returns:
        The places, [n]; None if nearly all are needed.
    """
    is_trained = loss_mask.T.flatten() != 0
    count = max(1, -(-int(is_trained.count_nonzero()) // _MULTIPLE)) * _MULTIPLE
    if count > _MOST_NEEDED * len(is_trained):
        return None
    # The trained ones come first, and others fill up.
    order = torch.sort(is_trained.to(torch.uint8), descending=True, stable=True).indices
    return order[:count].sort().values


def source_names(prefixes: Sequence[str]) -> list[str]:
    """Returns short names of data sets: that of the file, or all of the prefix if two share it."""
    names = [Path(prefix).name for prefix in prefixes]
    distinct = {
        name: {p for p, n in zip(prefixes, names, strict=True) if n == name} for name in names
    }
    return [
        name if len(distinct[name]) == 1 else prefix
        for name, prefix in zip(names, prefixes, strict=True)
    ]
