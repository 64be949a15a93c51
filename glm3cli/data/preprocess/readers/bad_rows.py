"""`BadRow`: a row that a reader can't parse, and the sentences that say why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BadRow:
    """A row that a reader could not parse, in its place among the rows of a chunk.

    Attributes:
        problem: What is wrong with it and what was expected.
        text: The row's text, or its beginning.
        field: The column that is wrong; "" for the whole row.
        line: The number of the row's line in its file, from 1; 0 where rows are counted instead.
    """

    problem: str
    text: str
    field: str = ""
    line: int = 0


def not_utf8(data: bytes) -> str:
    """Says that bytes aren't UTF-8, and names the Chinese encoding in which they can be read.

    Args:
        data: The bytes of a row or a cell.
    """
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 ({error.reason} at byte {error.start})"
    else:
        return "is UTF-8"
    try:
        data.decode("gb18030")
    except UnicodeDecodeError:
        return problem
    return (
        f"{problem}, but could be GBK: convert the file with iconv -f GB18030 -t UTF-8, which "
        "reads GBK, too"
    )
