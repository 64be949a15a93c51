"""Which beginnings rows of token ids have in common, so that each is read once."""

from collections.abc import Sequence
from dataclasses import dataclass

from glm3cli.infer.rows import shared_length


@dataclass(frozen=True)
class Branch:
    """A row of token ids, as what it adds to another one.

    Attributes:
        row: The index of the row.
        source: The index of the row that has the beginning, too, and reads it; None if no other
            row does.
        start: The number of tokens of the beginning.
        level: The number of rows that must be read before it, one after the other.
    """

    row: int
    source: int | None
    start: int
    level: int


def branches_of(rows: Sequence[list[int]], firsts: Sequence[int]) -> list[Branch]:
    """Returns how rows branch off from each other, those first that others need.

    In alphabetical order the longest beginning that a row has in common with any row before it is
    the one that it has in common with its neighbour. Where that has it from others, the row goes on
    from the one that reads the last token of the beginning.

    Args:
        rows: The token ids of each row.
        firsts: The first position of each row that must be read, whatever others have read.
    """
    found: dict[int, Branch] = {}
    before: Branch | None = None
    for row in sorted(range(len(rows)), key=lambda row: rows[row]):
        start = 0
        if before is not None:
            start = shared_length(rows[row], rows[before.row], firsts[row])
        source = before if start else None
        while source is not None and source.source is not None and start <= source.start:
            source = found[source.source]
        if source is None:
            before = Branch(row, None, 0, 0)
        else:
            before = Branch(row, source.row, start, source.level + 1)
        found[row] = before
    return sorted(found.values(), key=lambda branch: branch.level)
