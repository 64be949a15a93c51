"""Changes JSON schemas before llguidance reads them.

Source of the keywords: JSON Schema, draft 2020-12, core and validation.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any]

# Far above what people write, and below what Python's stack holds.
_MOST_LEVELS = 200
# Keywords with schemas by names, and those with values that are no schemas.
_NAMED = frozenset(
    ("properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions")
)
_VALUES = frozenset(("const", "enum", "default", "examples"))


def changed(schema: Any, change: Callable[[Schema], Schema], levels: int = _MOST_LEVELS) -> Any:
    """Returns a schema with a change made to it and to each schema in it.

    Args:
        schema: The schema, or anything that stands in the place of one.
        change: Returns what a schema becomes; those in it are changed afterwards.
        levels: How deep schemas may stand within each other.

    Raises:
        ValueError: It is nested more deeply.
    """
    if not levels:
        raise ValueError("it is nested too deeply")
    if isinstance(schema, list):
        return [changed(one, change, levels - 1) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in change(schema).items():
        if key in _NAMED and isinstance(value, Mapping):
            found[key] = {name: changed(one, change, levels - 1) for name, one in value.items()}
        else:
            found[key] = value if key in _VALUES else changed(value, change, levels - 1)
    return found


def without_unknown_formats(schema: Any) -> Any:
    """Returns a schema without the formats that llguidance doesn't know.

    A format is an annotation, by which a validator may be guided or not (section 7.2.1 of the
    specification's part on validation).

    Raises:
        ValueError: The schema is nested too deeply.
    """
    return changed(schema, _without_unknown_format)


def _without_unknown_format(schema: Schema) -> Schema:
    if "format" not in schema or _knows(schema["format"]):
        return schema
    return {key: value for key, value in schema.items() if key != "format"}


def _knows(name: Any) -> bool:
    """Returns whether llguidance knows a format."""
    return isinstance(name, str) and _is_known(name)


@functools.lru_cache(maxsize=256)
def _is_known(name: str) -> bool:
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema({"type": "string", "format": name})
    is_wrong, _ = LLMatcher.validate_grammar_with_warnings(grammar)
    return not is_wrong


def with_refs_moved(schema: Any, place: str) -> Any:
    """Returns a schema whose references to its own parts lead to where it will stand.

    Args:
        schema: The schema.
        place: The pointer to it in the schema of which it becomes a part, such as `#/$defs/all`.

    Raises:
        ValueError: The schema is nested too deeply.
    """

    def moved(one: Schema) -> Schema:
        target = one.get("$ref")
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            return one
        return {**one, "$ref": place + target[1:]}

    return changed(schema, moved)


def resolved(schema: Schema) -> Schema:
    """Returns a schema whose reference at the top, if it has one, is replaced by what it names.

    Raises:
        ValueError: It leads out of the schema, to nothing, or in a circle.
    """
    found, passed = schema, set[str]()
    while "$ref" in found:
        target, pointer = schema, str(found["$ref"])
        if pointer in passed:
            raise ValueError(f"{pointer!r} leads in a circle")
        passed.add(pointer)
        for part in _parts(pointer):
            inner = target.get(part)
            if not isinstance(inner, Mapping):
                raise ValueError(f"{pointer!r} leads to nothing in the schema")
            target = inner
        found = {**target, **{key: value for key, value in found.items() if key != "$ref"}}
    return found


def _parts(pointer: str) -> list[str]:
    """Returns the names on the way of a reference within a schema (RFC 6901)."""
    if pointer == "#":
        return []
    if not pointer.startswith("#/"):
        raise ValueError(f"{pointer!r} leads out of the schema")
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer[2:].split("/")]
