"""Reads the fields of a row; a field that isn't of the expected form is a `RowError`."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from glm3cli.data.preprocess.readers.json_text import json_value

Row = Mapping[str, Any]

_YES, _NO = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")


class RowError(Exception):
    """A row that isn't of the expected form.

    Attributes:
        field: The field that is wrong, such as `messages[2].role`.
        problem: What is wrong with it and what was expected.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


def text_of(row: Row, field: str, optional: bool = False, within: str = "") -> str:
    """Returns the string in a field of a row.

    Args:
        row: The row, or a mapping within it.
        field: The name of the field.
        optional: Returns "" if the field is missing or null.
        within: Which field of the row `row` is, for the error message; "" for the row itself.

    Raises:
        RowError: The field is missing or isn't a string.
    """
    value = row.get(field)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    place = f"{within}.{field}" if within else field
    if field not in row:
        raise RowError(place, f"is missing; {within or 'the row'} has {listed(row)}")
    raise RowError(place, f"expected a string, got {shown(value)}")


def weight_of(row: Row) -> float:
    """Returns how much a row weighs in the loss, by its field `weight`; 1 if it has none.

    Raises:
        RowError: The field is no number, or below 0.
    """
    value = row.get("weight")
    if value is None or value == "":
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise RowError("weight", f"expected a number of at least 0, got {shown(value)}")
    return weight


def truth_of(value: Any) -> bool | None:
    """Returns whether a value says yes: true or 1, or a text that says so, as CSV has it.

    Returns:
        None if it says neither yes nor no.
    """
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in (*_YES, *_NO):
        return value.strip().lower() in _YES
    return None


def first_of(row: Row, fields: Iterable[str]) -> str | None:
    """Returns the first of several fields that is there and not null, or None."""
    return next((field for field in fields if row.get(field) is not None), None)


def only_one(row: Row, fields: Iterable[str], place: str) -> str | None:
    """Returns the one of several fields, spellings of the same, that is there and not null.

    Returns:
        The field; None if there is none, and the first of several with equal values.

    Raises:
        RowError: There are several, and their values differ.
    """
    there = [field for field in fields if row.get(field) is not None]
    for other in there[1:]:
        if row[other] != row[there[0]]:
            both = f"{there[0]} {shown(row[there[0]])} and {other} {shown(row[other])}"
            raise RowError(place, f"expected one of them, got {both}")
    return there[0] if there else None


def list_of(row: Row, field: str) -> list[Any]:
    """Returns the list in a field of a row, parsed if it is JSON in a string, as CSV needs it.

    Raises:
        RowError: It isn't a list.
    """
    value = row.get(field)
    if isinstance(value, str) and value.lstrip().startswith("["):
        if "'" in value.lstrip()[:3]:
            problem = "is a Python list as text, as pandas writes it; json.dumps makes JSON of it"
            raise RowError(field, f"{problem}: {shown(value)}")
        value = parsed(value, field)
    if isinstance(value, list):
        return value
    raise RowError(field, f"expected a list, got {shown(value)}")


def json_of(row: Row, field: str, within: str = "") -> Any:
    """Returns the JSON value in a field, parsed if it is a string, as columnar formats write it.

    Args:
        row: The row, or a mapping within it.
        field: The name of the field.
        within: Which field of the row `row` is, for the error message; "" for the row itself.

    Returns:
        The value; None if the field is missing, null, or an empty string.

    Raises:
        RowError: The string isn't JSON, or the value is of a type that JSON lacks.
    """
    value, place = row.get(field), f"{within}.{field}" if within else field
    if isinstance(value, str):
        return parsed(value, place) if value.strip() else None
    check_json(value, place)
    return value


def parsed(text: str, place: str) -> Any:
    """Parses the JSON in a field, which errors name; raises RowError if it isn't JSON."""
    try:
        return json_value(text)
    except ValueError as error:
        raise RowError(place, f"expected JSON, got {shown(text)}: {error}") from None


def check_json(value: Any, place: str) -> None:
    """Checks that a value of a columnar file has a form in JSON, as dates and bytes don't.

    Raises:
        RowError: It has none.
    """
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            check_json(item, place)
    elif not isinstance(value, str | int | float | None):
        raise RowError(place, f"expected values of JSON, got {shown(value)}: write it as text")


def listed(row: Row) -> str:
    """Lists the fields of a row that aren't null, for an error message."""
    return ", ".join(name for name, value in row.items() if value is not None) or "nothing"


def shown(value: Any) -> str:
    """Returns the type and the beginning of a value, for an error message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
