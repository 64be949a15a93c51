"""The order in which samples are read: blends of several data sets, and groups of equal lengths."""

from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
from megatron.core.datasets import helpers

from glm3cli.data.samples.spec import Dataset, Sample, VariedDataset

# The number of steps among whose samples those of similar lengths are brought together.
_STEPS = 64


class BlendedSamples:
    """Samples of several datasets in fixed proportions, in the order of megatron-core's blending.

    Attributes:
        dataset_index: The number of the dataset that each sample is from, int16 [num_samples];
            megatron-core's BlendedDataset has the same attribute.
    """

    def __init__(
        self, datasets: Sequence[VariedDataset], weights: Sequence[float], num_samples: int
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

    def locate(self, index: int) -> tuple[VariedDataset, int]:
        """Returns the single dataset that a sample comes from, and its position there."""
        return self._datasets[self.dataset_index[index]].locate(int(self._place[index]))

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        """Returns the number of positions of each of some samples, int64 [len(indices)]."""
        chosen = np.asarray(indices, dtype=np.int64)
        found = np.zeros(len(chosen), dtype=np.int64)
        for number, dataset in enumerate(self._datasets):
            is_here = self.dataset_index[chosen] == number
            found[is_here] = dataset.sizes(self._place[chosen[is_here]].tolist())
        return found


class GroupedByLength:
    """The samples of a dataset in an order that brings similar lengths together.

    Among the samples of every 64 steps, those of similar lengths form the steps, and the steps are
    in a random order; but the very first step has the longest samples, so that a lack of memory
    shows at once. Within a step the longest come first. The order doesn't depend on the parallel
    sizes or on the number of steps of the run.
    """

    def __init__(
        self, dataset: VariedDataset, num_samples: int, samples_of_step: int, seed: int
    ) -> None:
        """Takes the samples; their order is found as they are read.

        Args:
            dataset: The samples in a random order.
            num_samples: The number of samples that can be read, which `whole_windows` returns.
            samples_of_step: The number of samples of a step.
            seed: The seed of the order of the steps.
        """
        self._dataset, self._num_samples, self._seed = dataset, num_samples, seed
        self._samples_of_step = samples_of_step
        self._window = samples_of_step * _STEPS
        self._cached_order = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[self._place(index)]

    def locate(self, index: int) -> tuple[VariedDataset, int]:
        """Returns the single dataset that a sample comes from, and its position there."""
        return self._dataset.locate(self._place(index))

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        """Returns the number of positions of each of some samples, int64 [len(indices)]."""
        return self._dataset.sizes([self._place(index) for index in indices])

    @cached_property
    def dataset_index(self) -> np.ndarray:
        """The number of the dataset that each sample is from, as `BlendedSamples` has it."""
        windows = range(self._num_samples // self._window)
        order = np.concatenate([self._order(window) for window in windows])
        return source_index(self._dataset)[order]

    def _place(self, index: int) -> int:
        """Returns the position in the random order of the sample that is read at `index`."""
        window, place = divmod(index, self._window)
        return int(self._cached_order(window)[place])

    def _order(self, window: int) -> np.ndarray:
        """Returns the positions in the random order of the samples of a window."""
        start = window * self._window
        sizes = self._dataset.sizes(range(start, start + self._window))
        steps = (start + np.argsort(-sizes, kind="stable")).reshape(_STEPS, self._samples_of_step)
        first = 1 if window == 0 else 0
        np.random.RandomState([self._seed, window]).shuffle(steps[first:])
        return steps.flatten()


def whole_windows(num_samples: int, samples_of_step: int) -> int:
    """Returns a number of samples, rounded up to what `GroupedByLength` looks at together."""
    window = samples_of_step * _STEPS
    return -(-num_samples // window) * window


def blend(
    datasets: Sequence[VariedDataset], weights: Sequence[float], num_samples: int
) -> VariedDataset:
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
    return np.bincount(source_index(dataset)[:consumed], minlength=num_parts).tolist()


def source_index(dataset: Dataset) -> np.ndarray:
    """Returns the number of the dataset that each sample of a blend is from, [number of samples].

    Args:
        dataset: The blend: one of ours, or megatron-core's BlendedDataset.
    """
    # An attribute of these classes, but not of the protocol, since a single dataset lacks it.
    index: np.ndarray = getattr(dataset, "dataset_index")  # noqa: B009
    return index
