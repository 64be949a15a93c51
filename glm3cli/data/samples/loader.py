"""Cuts the samples of each optimizer step into the micro-batches of this rank.

Step k of a run takes the samples [k * global_batch_size, (k + 1) * global_batch_size), whatever the
parallel sizes are. So the position in the data is one number, and the loss doesn't depend on data
parallelism.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm3cli.data.samples.datasets import Dataset, consumed_by_part
from glm3cli.errors import DataError


@dataclass(frozen=True)
class Batch:
    """One micro-batch of b sequences.

    With context parallelism, s below is the number of this rank's positions, a part of the S
    positions of the whole sequence.

    Attributes:
        tokens: The token ids, int64 [b, s].
        labels: The id that each position is to predict, int64 [b, s]; arbitrary where `loss_mask`
            is 0.
        loss_mask: 1 for positions with loss, else 0, float32 [b, s].
        segment_ids: The number, from 1, of the sample within its pack that each position belongs
            to, and 0 for padding, int64 [b, S]; None if no sequence is a pack of several samples.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    segment_ids: Tensor | None = None


@dataclass(frozen=True)
class Loader:
    """Cuts the samples of a step into the micro-batches of this data parallel rank.

    Attributes:
        dataset: The samples.
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
        """Returns how many of the first `consumed` samples come from each of `sources`."""
        counts = consumed_by_part(self.dataset, len(self.sources), consumed)
        total = dict.fromkeys(self.sources, 0)
        for source, count in zip(self.sources, counts, strict=True):
            total[source] += count
        return total

    def microbatches(self, consumed: int) -> Iterator[Batch]:
        """Yields this rank's micro-batches of one optimizer step.

        Args:
            consumed: The number of samples that all steps before it have taken, over all ranks.

        Raises:
            DataError: A token id is beyond the vocabulary.
        """
        stride = self.micro_batch_size * self.dp_size
        first = consumed + self.dp_rank * self.micro_batch_size
        for start in range(first, first + self.global_batch_size, stride):
            yield self._batch(range(start, start + self.micro_batch_size))

    def _batch(self, indices: range) -> Batch:
        """Reads the samples of one micro-batch."""
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
