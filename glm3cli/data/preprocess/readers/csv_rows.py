"""Reads the rows of a CSV or TSV file; one that can't be parsed doesn't take others with it."""

import csv
import io
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from glm3cli.data.preprocess.readers.bad_rows import BadRow, not_utf8
from glm3cli.data.preprocess.readers.chunks import ColumnChooser, DamageError, columns_to_read
from glm3cli.data.preprocess.readers.unpacked import check_end
from glm3cli.errors import DataError

# A quote that is not closed within so many characters is a stray one; it bounds the memory.
_MOST_CHARACTERS = 1 << 27
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_SHOWN_CHARACTERS = 100  # of the line in which a file ends within a quote


def read_csv(
    path: Path, stream: BinaryIO, choose: ColumnChooser, separator: str = ","
) -> Iterator[dict[str, str] | BadRow]:
    """Yields the chosen columns of every row of a CSV file.

    Args:
        path: The file, for error messages.
        stream: Its content.
        choose: Chooses the columns to read.
        separator: What stands between the cells of a row.

    Raises:
        DataError: The file lacks columns, has another separator, or ends within a quote.
    """
    csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 kB
    # Bytes that aren't UTF-8 become half surrogate pairs, which UTF-8 can't have: so they are found
    # in the cells, and spoil no other row.
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    records = _Records(path, text, stream, separator)
    header = next(records, None)
    if header is None:  # as a file of no lines in any other format
        text.detach()
        return
    if not header:
        raise DataError(f"{path} begins with an empty line", "begin it with the column names")
    if isinstance(header, BadRow):
        raise DataError(f"{path}: its line of column names {header.problem}", "mend the line")
    if problem := _encoding_problem(header):
        raise DataError(f"{path}: its line of column names {problem}", "convert it to UTF-8")
    names = _names(path, choose, header, separator)
    places = {name: header.index(name) for name in names}
    records.width = len(header)
    for record in records:
        if isinstance(record, BadRow):
            yield record
        elif record:  # a blank line has no cells
            yield _row(record, header, places)
    text.detach()  # else the wrapper's end would close the file, whose position is still read


def _names(path: Path, choose: ColumnChooser, header: list[str], separator: str) -> list[str]:
    """Returns the columns to read; raises DataError if they lack, or if others separate them."""
    try:
        return columns_to_read(path, choose, header)
    except DamageError:
        other = next((mark for mark in _SEPARATORS if mark in header[0]), None)
        if len(header) > 1 or other is None:
            raise
        found, expected = _SEPARATORS[other], _SEPARATORS[separator]
        way_out = "name it .tsv" if other == "\t" else "write it anew with commas"
        if other == ",":
            way_out = "name it .csv"
        raise DamageError(
            f"{path} has {found} between its columns, not {expected}: {header[0]!r}", way_out, 1.0
        ) from None


def _row(record: list[str], header: list[str], places: dict[str, int]) -> dict[str, str] | BadRow:
    """Returns the chosen cells of a record, or why it is no row."""
    if len(record) != len(header):
        return _of_wrong_width(record, header)
    row = {name: record[place] for name, place in places.items()}
    for name, cell in row.items():
        if problem := _encoding_problem([cell]):
            return BadRow(problem, _shown(record), name)
    return row


def _encoding_problem(cells: list[str]) -> str:
    """Says that cells aren't UTF-8; returns "" if they are."""
    try:
        for cell in cells:
            cell.encode("utf-8")
    except UnicodeEncodeError:
        return not_utf8(",".join(cells).encode("utf-8", "surrogateescape"))
    return ""


def _of_wrong_width(record: list[str], header: list[str]) -> BadRow:
    both = f"{_counted(len(record), 'cell')}, but the header {_counted(len(header), 'column')}"
    if len(record) < len(header):
        problem = f"expected a string, got nothing: the row has {both}"
        return BadRow(problem, _shown(record), header[len(record)])
    return BadRow(f"has {both}; put texts with a separator in quotes", _shown(record))


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _shown(record: list[str]) -> str:
    return ascii(record) if _encoding_problem(record) else repr(record)


class _Records:
    """Iterates over the records of a CSV file, each its list of cells or a `BadRow`.

    A stray quote may join a row with lines behind it. If such a record can't be parsed, its first
    line alone is bad, and reading goes on with the next one. But where texts have line breaks and
    there is only one column, a line is no sign of a row: there the whole record is bad.

    Attributes:
        width: The number of columns.
    """

    def __init__(
        self, path: Path, text: io.TextIOWrapper, stream: BinaryIO, separator: str
    ) -> None:
        self.width = 0
        self._path, self._text, self._stream = path, text, stream
        self._again: deque[str] = deque()  # lines that are read again
        self._record: list[str] = []  # the lines of the current record
        self._size = 0  # its characters
        self._lines_are_rows = True
        self._reader = csv.reader(_Lines(self), delimiter=separator, strict=True)

    def __iter__(self) -> "_Records":
        return self

    def __next__(self) -> list[str] | BadRow:
        self._record, self._size = [], 0
        try:
            record = next(self._reader)
        except csv.Error as error:
            return self._bad(error)
        if len(self._record) > 1:
            self._lines_are_rows = False
        return record

    def line(self) -> str:
        """Returns the next line of the current record; raises StopIteration at the end."""
        if self._size > _MOST_CHARACTERS:
            raise csv.Error("a quote isn't closed")
        line = self._again.popleft() if self._again else next(self._text, "")
        if not line.endswith(("\n", "\r")) and not self._again:
            check_end(self._stream)  # the line may be cut off
        if not line:
            raise StopIteration
        self._record.append(line)
        self._size += len(line)
        return line

    def _bad(self, error: csv.Error) -> BadRow:
        first, *others = self._record
        if not others and str(error) == "unexpected end of data":
            raise DamageError(
                f"{self._path} is damaged or cut short: a quote is not closed in its last line "
                f"{_shown([first[:_SHOWN_CHARACTERS]])}",
                "fetch it again, or close the quote",
            )
        problem = f"is not valid CSV ({error}): write a quote within a text twice"
        if self.width == 1 and not self._lines_are_rows:
            problem += f"; {len(self._record)} lines belong to it"
        else:
            self._again.extendleft(reversed(others))
        return BadRow(problem, _shown([first.rstrip("\r\n")]))


class _Lines:
    """Iterates over the lines of `_Records`, also on after their end when some are read again."""

    def __init__(self, records: _Records) -> None:
        self._records = records

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        return self._records.line()
