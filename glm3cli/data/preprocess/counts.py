"""What is counted of rows on their way to tokens."""

from dataclasses import dataclass, fields, replace


@dataclass
class Counts:
    """What was read and written.

    Attributes:
        documents: Rows that became a document.
        tokens: Tokens written, labels and masks not counted.
        bytes: Text encoded, as UTF-8.
        empty: Rows without any text.
        bad_rows: Bad rows, and rests of damaged files, left out.
        dropped: Samples of which --seq-length left no answer.
        truncated: Samples that --seq-length cut.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    bad_rows: int = 0
    dropped: int = 0
    truncated: int = 0

    @property
    def skipped(self) -> int:
        """Rows and samples that were left out."""
        return self.bad_rows + self.dropped

    def copy(self) -> "Counts":
        """The counts as they are now."""
        return replace(self)

    def add(self, other: "Counts") -> None:
        """Adds those of a part."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
