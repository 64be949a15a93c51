"""Samples of preference data: pairs of answers, and answers that were liked or not.

An answer with its prompt is a segment of a sample; `data.kinds` says what its segment id means. A
sample also has true labels where nothing is trained, and, once it is known what a reference thinks
of its answers, `reference` (float32): the log-probability of an answer at its first trained
position, else 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from glm3cli.data.indexed import read_lengths
from glm3cli.data.kinds import FEEDBACK, PAIRS
from glm3cli.data.samples.instructions import InstructionDataset, build_documents, joined
from glm3cli.data.samples.spec import DataSpec, Sample, VariedDataset
from glm3cli.data.tokens.messages import IGNORED_LABEL
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError


def build_pairs(spec: DataSpec, tokenizer: Tokenizer) -> tuple[VariedDataset, VariedDataset | None]:
    """Builds samples of pairs.

    The arguments and the result are those of `datasets.build_samples`.

    Raises:
        DataError: A split has no document, a file is damaged, the three file pairs of a data set
            don't belong together, or a pair is too long.
    """
    _check_lengths(spec)
    return build_documents(spec, PAIRS, PreferenceDataset)


def build_feedback(
    spec: DataSpec, tokenizer: Tokenizer
) -> tuple[VariedDataset, VariedDataset | None]:
    """Builds samples of answers that were liked or not.

    The arguments and the result are those of `datasets.build_samples`.

    Raises:
        DataError: A split has no document, a file is damaged, or the three file pairs of a data set
            don't belong together.
    """
    return build_documents(spec, FEEDBACK, PreferenceDataset)


def _check_lengths(spec: DataSpec) -> None:
    """Checks that no pair is longer than a row, which would cut its rejected answer.

    Raises:
        DataError: One is.
    """
    for prefix in spec.blend.prefixes:
        lengths = read_lengths(PAIRS.main_file(prefix), f"--data {prefix}")
        if (longer := int((lengths > spec.seq_length + 1).sum())) > 0:
            raise DataError(
                f"--data {prefix}: {longer:,} of {len(lengths):,} samples are longer than the "
                f"{spec.seq_length:,} tokens that two sequences of --seq-length have, up to "
                f"{int(lengths.max()):,}",
                "give preprocess the same --seq-length, which cuts their prompts, or use a larger "
                "one",
            )


# The number of a document, and the place of a mismatched answer in it; None for its own answers.
Place = tuple[int, int | None]


class PreferenceDataset(InstructionDataset):
    """Samples of pairs or of feedback, in the order of `InstructionDataset`.

    Attributes:
        references: The log-probabilities of answers under the reference by document and segment
            id - 1, [documents of the data set, largest segment id]; None without a reference.
        mismatched_references: The same for mismatched answers, by the answer's place in its
            document.
    """

    stride: ClassVar[int] = 2

    def __init__(
        self,
        files: Mapping[str, IndexedDataset],
        documents: np.ndarray,
        spec: DataSpec,
        *,
        longest_first: int = 0,
    ) -> None:
        super().__init__(files, documents, spec, longest_first=longest_first)
        self._seed = spec.seed
        self.references: np.ndarray | None = None
        self.mismatched_references: np.ndarray | None = None

    def document(self, document: int) -> Sample:
        """Reads a document, of which each token is to predict the next one."""
        sample = super().document(document)
        ids, labels = (
            np.asarray(self._files[key][document][1 : len(sample["tokens"]) + 1], dtype=np.int64)
            for key in ("input_ids", "labels")
        )
        sample["labels"], sample["loss_mask"] = ids, (labels != IGNORED_LABEL).astype(np.float32)
        if self.references is not None:
            _set_references(sample, self.references[document])
        return sample

    @property
    def num_documents(self) -> int:
        """The number of documents of the data set, of which the samples are taken from some."""
        return len(self._files["input_ids"])

    @property
    def path(self) -> str:
        """The path of the token ids, without `.bin` and `.idx`."""
        return str(self._files["input_ids"].path_prefix)

    def mismatched(self, index: int) -> Sample:
        """Returns mismatched answers: each prompt of a sample with the answer of another one.

        As many as fit into a row. The segment ids number them.
        """
        parts, room = [], self._seq_length
        for _, part in (p for number in self.pack(index) for p in self.mismatched_answers(number)):
            if len(part["tokens"]) <= room:
                parts.append(part)
                room -= len(part["tokens"])
        return joined(parts, 1) if parts else _nothing(self.references is not None)

    def mismatched_answers(self, document: int) -> Iterator[tuple[int, Sample]]:
        """Yields the mismatched answers of a document, each cut to a row, as samples of their own.

        The other document is always the same one, so that what a reference thinks of the answer has
        to be found out once. Each comes with its place in the document, and what has no answer left
        is left out.
        """
        answers = self._answers(self._partner[document])
        for place, (prompt, _) in enumerate(self._answers(document)):
            ids = np.concatenate([prompt, answers[place % len(answers)][1]])[: self._seq_length + 1]
            mask = np.arange(1, len(ids)) >= len(prompt)
            if not mask.any():
                continue
            sample = {
                "tokens": ids[:-1],
                "segment_ids": np.ones(len(ids) - 1, dtype=np.int64),
                "labels": ids[1:],
                "loss_mask": mask.astype(np.float32),
            }
            if self.mismatched_references is not None:
                _set_references(sample, self.mismatched_references[document, place : place + 1])
            yield place, sample

    def _answers(self, document: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the token ids of the prompt and of the answer of each segment of a document."""
        ids, labels, segments = (
            np.asarray(self._files[key][document], dtype=np.int64)
            for key in ("input_ids", "labels", "attention_mask")
        )
        found = []
        for number in np.unique(segments):
            is_here = segments == number
            own = ids[is_here]
            start = int(np.argmax(labels[is_here] == own))
            found.append((own[:start], own[start:]))
        return found

    @cached_property
    def _partner(self) -> dict[int, int]:
        """The documents whose answers go to the prompts of each document: those before in a circle.

        The circle is random: the answers of neighbours may be to the same prompt.
        """
        circle = self.documents.copy()
        np.random.RandomState(self._seed).shuffle(circle)
        return dict(zip(circle.tolist(), np.roll(circle, 1).tolist(), strict=True))


def _set_references(sample: Sample, values: np.ndarray) -> None:
    """Adds the array `reference` to a sample, of the log-probability of each segment in order."""
    reference = np.zeros(len(sample["tokens"]), dtype=np.float32)
    for number in np.unique(sample["segment_ids"]).tolist():
        trained = (sample["segment_ids"] == number) & (sample["loss_mask"] > 0)
        if trained.any():
            reference[int(np.argmax(trained))] = values[number - 1]
    sample["reference"] = reference


def _nothing(has_reference: bool) -> Sample:
    """Returns a sample without a position."""
    found: Sample = {
        key: np.zeros(0, dtype=np.int64) for key in ("tokens", "segment_ids", "labels")
    }
    for key in ("loss_mask", *(["reference"] if has_reference else [])):
        found[key] = np.zeros(0, dtype=np.float32)
    return found


class MismatchedSamples:
    """The mismatched answers of a dataset's samples: each prompt with another prompt's answer.

    KTO estimates with them how far the model is from the reference.
    """

    def __init__(self, dataset: VariedDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        dataset: Any
        dataset, place = self._dataset.locate(index)
        found: Sample = dataset.mismatched(place)
        return found

    def locate(self, index: int) -> tuple[VariedDataset, int]:
        """Returns the single dataset whose prompt and answer a sample has, and its position."""
        return self._dataset.locate(index)

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        """Returns the number of positions of each of some samples, int64 [len(indices)]."""
        return np.array([len(self[index]["tokens"]) for index in indices], dtype=np.int64)


class AnswersOfDocuments:
    """The answers of some documents, so that a reference sees each of them once."""

    def __init__(self, dataset: PreferenceDataset, places: Sequence[Place]) -> None:
        """Takes the documents.

        Args:
            dataset: The dataset.
            places: What to read as the samples. What is read after the last one is the last again.
        """
        self._dataset, self._places = dataset, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        document, mismatched = self._places[min(index, len(self) - 1)]
        if mismatched is None:
            return self._dataset.document(document)
        return dict(self._dataset.mismatched_answers(document))[mismatched]

    def locate(self, index: int) -> tuple[VariedDataset, int]:
        """Returns this dataset and the position."""
        return self, index

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        """Returns the number of positions of each of some samples, int64 [len(indices)]."""
        return np.array([len(self[index]["tokens"]) for index in indices], dtype=np.int64)
