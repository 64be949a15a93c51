"""`Counts`: how many rows were read and how much was written."""

from dataclasses import dataclass, fields, replace


@dataclass
class Counts:
    """How many rows were read and how much was written.

    Attributes:
        documents: The number of rows that became a document.
        tokens: The number of tokens written, without labels and masks.
        bytes: The size of the encoded text, in bytes of UTF-8.
        empty: The number of rows without any text.
        bad_rows: The number of bad rows that were left out; the unreadable rest of a damaged file
            counts as one.
        dropped: The number of samples that were left out because --seq-length left no answer.
        truncated: The number of samples that --seq-length cut.
        equal: The number of pairs that were left out because their answers are the same.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    bad_rows: int = 0
    dropped: int = 0
    truncated: int = 0
    equal: int = 0

    @property
    def skipped(self) -> int:
        """The number of rows and samples that were left out."""
        return self.bad_rows + self.dropped + self.equal

    def copy(self) -> "Counts":
        """Returns a copy that further counting doesn't change."""
        return replace(self)

    def add(self, other: "Counts") -> None:
        """Adds the counts of another part of the input to these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
