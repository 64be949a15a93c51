"""Batches for this rank, at any position of the sample stream.

Step k of a run takes the samples [k * global_batch_size, (k + 1) * global_batch_size) whatever the
layout, so that the data position is one number and the loss doesn't depend on data parallelism.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm3cli.data.samples.datasets import Dataset, consumed_by_part
from glm3cli.errors import DataError


@dataclass(frozen=True)
class Batch:
    """One micro-batch: `tokens` and `labels` (int64) and `loss_mask` (float32), each [b, s].

    With context parallelism, s are this rank's positions.

    Attributes:
        segment_ids: Which sample of its pack each position of the whole sequence belongs to, from 1
            (0 for padding); None where no sequence is a pack of several.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    segment_ids: Tensor | None = None


@dataclass(frozen=True)
class Loader:
    """Cuts global batches into this data parallel rank's micro-batches.

    Attributes:
        sources: The prefixes that the samples come from.
        vocab_size: Rows of the embedding; a larger token id is an error, not a crash in a kernel.
    """

    dataset: Dataset
    micro_batch_size: int
    global_batch_size: int
    dp_rank: int
    dp_size: int
    vocab_size: int
    device: torch.device
    cp_rank: int = 0
    cp_size: int = 1
    sources: tuple[str, ...] = ("",)

    def consumed_by_source(self, consumed: int) -> dict[str, int]:
        """How many of the first `consumed` samples have come from each source."""
        counts = consumed_by_part(self.dataset, len(self.sources), consumed)
        total = dict.fromkeys(self.sources, 0)
        for source, count in zip(self.sources, counts, strict=True):
            total[source] += count
        return total

    def microbatches(self, consumed: int) -> Iterator[Batch]:
        """The micro-batches of the step that starts after `consumed` samples.

        Raises:
            DataError: A token id is beyond the vocabulary.
        """
        stride = self.micro_batch_size * self.dp_size
        first = consumed + self.dp_rank * self.micro_batch_size
        for start in range(first, first + self.global_batch_size, stride):
            yield self._batch(range(start, start + self.micro_batch_size))

    def _batch(self, indices: range) -> Batch:
        samples = [self.dataset[index] for index in indices]
        keys = ["tokens", "labels", "loss_mask"]
        if any(
            int(sample["segment_ids"].max()) > 1 for sample in samples if "segment_ids" in sample
        ):
            keys.append("segment_ids")
        tensors = {
            key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in keys
        }
        largest = max(int(tensors["tokens"].max()), int(tensors["labels"].max()))
        if largest >= self.vocab_size:
            raise DataError(
                f"sample {indices.start} has token id {largest}, but the model's vocabulary has "
                f"{self.vocab_size} entries",
                "preprocess the data with this model's tokenizer",
            )
        for key in ("tokens", "labels", "loss_mask"):
            tensors[key] = tensors[key].chunk(self.cp_size, dim=1)[self.cp_rank].contiguous()
        return Batch(**{key: tensor.to(self.device) for key, tensor in tensors.items()})
