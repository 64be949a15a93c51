"""`References`: what a reference thinks of the answers of a data set, in a file that keeps it."""

import contextlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm3cli.data.samples.preferences import Place, PreferenceDataset
from glm3cli.host.files import sync_one


@dataclass
class References:
    """The log-probabilities of the answers of a data set under a reference.

    Attributes:
        own: Of each document's answers, by segment id - 1, float32 [documents, answers]; NaN where
            it isn't known, and where a document has no such answer.
        mismatched: The same of mismatched answers, by their places.
    """

    own: np.ndarray
    mismatched: np.ndarray

    @classmethod
    def unknown(cls, num_documents: int) -> "References":
        """Returns the table of a data set of which nothing is known."""
        nothing = np.full((num_documents, 0), np.nan, dtype=np.float32)
        return cls(nothing, nothing.copy())

    @classmethod
    def read(cls, file: Path, num_documents: int) -> "References":
        """Reads a file; a file that is missing or damaged says nothing."""
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                found = cls(arrays["own"], arrays["mismatched"])
            if len(found.own) == len(found.mismatched) == num_documents:
                return found
        return cls.unknown(num_documents)

    def write(self, file: Path) -> None:
        """Writes a file aside and renames it.

        Raises:
            OSError: The disk is full or failing.
        """
        partial = file.with_name(f".{file.name}.partial")
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            np.savez(stream, own=self.own, mismatched=self.mismatched)
        sync_one(partial)
        partial.replace(file)

    @property
    def num_known(self) -> int:
        """The number of answers that are known."""
        return int((~np.isnan(self.own)).sum() + (~np.isnan(self.mismatched)).sum())

    def missing(
        self, dataset: PreferenceDataset, documents: Sequence[int], *, mismatched: bool
    ) -> Iterator[Place]:
        """Yields what of some documents isn't known.

        Args:
            dataset: A dataset of these documents.
            documents: The numbers of the documents.
            mismatched: Whether their mismatched answers are needed, too.
        """
        for document in documents:
            if np.isnan(self.own[document]).all():
                yield document, None
        for document in documents if mismatched else ():
            known = ~np.isnan(self.mismatched[document])
            for place, _ in dataset.mismatched_answers(document):
                if not known[place : place + 1].any():
                    yield document, place

    def note(self, place: Place, values: Mapping[int, float]) -> None:
        """Notes the log-probabilities of a document's own answers, or of a mismatched one.

        Args:
            place: The document, and the place of a mismatched answer.
            values: The log-probabilities by segment id - 1. Without any, 0 is noted, so that what
                has no trained token isn't looked at again.
        """
        document, mismatched = place
        if mismatched is None:
            self.own = _with(self.own, document, values or {0: 0.0})
        else:
            value = values.get(0, 0.0)
            self.mismatched = _with(self.mismatched, document, {mismatched: value})

    def attach(self, dataset: PreferenceDataset) -> None:
        """Gives the log-probabilities to the samples of the data set."""
        dataset.references = self.own
        dataset.mismatched_references = self.mismatched if self.mismatched.shape[1] else None


def _with(table: np.ndarray, document: int, values: Mapping[int, float]) -> np.ndarray:
    """Returns a table with values by column in the row of a document; it may get more columns."""
    more = max(values) + 1 - table.shape[1]
    if more > 0:
        table = np.pad(table, ((0, 0), (0, more)), constant_values=np.nan)
    for column, value in values.items():
        table[document, column] = value
    return table
