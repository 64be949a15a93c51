"""Makes the values of Arrow's columns what JSON would have, by the columns' types."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

# Makes a value of a column, as `to_pylist` gives it, one of JSON.
Plain = Callable[[Any], Any]


def without_zones(table: Any) -> Any:
    """Returns a table or record batch whose times, at any depth, have no time zone and no ns.

    Python may not know the zone of a time, not even UTC where there is no tzdata, and has no
    nanoseconds. Then a row could not be read, though nothing needs its times. A time with a zone
    becomes the one of UTC.
    """
    kinds = [_zoneless(field.type) for field in table.schema]
    if kinds == [field.type for field in table.schema]:
        return table
    columns = [
        column if column.type == kind else column.cast(kind, safe=False)
        for column, kind in zip(table.columns, kinds, strict=True)
    ]
    return type(table).from_arrays(columns, names=table.schema.names)


def plain_of(kind: Any) -> Plain | None:
    """Returns what makes the values of an Arrow type plain; None if they are so already.

    In Arrow all structs of a column have the same keys: those that a value lacked are null, and are
    left out. Maps become dicts. Some programs (Hive, Impala, older Spark) write texts as bytes;
    bytes that are no UTF-8 stay.

    Args:
        kind: The type, a pyarrow.DataType.
    """
    from pyarrow import types

    if types.is_struct(kind):
        return _of_struct({field.name: plain_of(field.type) for field in kind})
    if types.is_map(kind):
        return _of_map(plain_of(kind.key_type), plain_of(kind.item_type))
    if types.is_dictionary(kind):
        return plain_of(kind.value_type)
    if types.is_nested(kind) and hasattr(kind, "value_type"):
        return _of_list(plain_of(kind.value_type))
    return _text if "binary" in str(kind) else None


def _of_struct(parts: dict[str, Plain | None]) -> Plain:
    def plain(value: Any) -> Any:
        if value is None:
            return None
        return {
            name: _applied(parts[name], item) for name, item in value.items() if item is not None
        }

    return plain


def _of_map(key: Plain | None, item: Plain | None) -> Plain:
    def plain(value: Any) -> Any:
        if value is None:
            return None
        return {_applied(key, name): _applied(item, one) for name, one in value}

    return plain


def _of_list(item: Plain | None) -> Plain | None:
    if item is None:
        return None
    return lambda value: value if value is None else [item(one) for one in value]


def _applied(plain: Plain | None, value: Any) -> Any:
    return plain(value) if plain else value


def _text(value: Any) -> Any:
    """Returns bytes as text if they are UTF-8."""
    with suppress(AttributeError, UnicodeDecodeError):
        return value.decode("utf-8")
    return value


@cache
def _zoneless(kind: Any) -> Any:
    """Returns a type whose times, at any depth, have no zone and no nanoseconds."""
    import pyarrow
    from pyarrow import types

    if types.is_timestamp(kind):
        return pyarrow.timestamp("us" if kind.unit == "ns" else kind.unit)
    if kind in (pyarrow.duration("ns"), pyarrow.time64("ns")):
        return pyarrow.duration("us") if types.is_duration(kind) else pyarrow.time64("us")
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_zoneless(field.type)) for field in kind])
    if types.is_map(kind) and kind.item_type != (item := _zoneless(kind.item_type)):
        return pyarrow.map_(kind.key_type, item)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = kind.value_field.with_type(_zoneless(kind.value_type))
        if types.is_fixed_size_list(kind):
            return pyarrow.list_(inner, kind.list_size)
        return pyarrow.list_(inner) if types.is_list(kind) else pyarrow.large_list(inner)
    return kind
