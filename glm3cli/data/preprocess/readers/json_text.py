"""Parses JSON texts; what is wrong with one becomes a ValueError whose message is a sentence."""

import json
from typing import Any

# Far more than data needs, and far less than the number of levels at which Python gives up.
MAX_DEPTH = 100
TOO_DEEP = f"is nested in more than {MAX_DEPTH} levels"


def json_value(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: The text isn't JSON, is nested too deep, or has a number of too many digits; the
            message says so and can follow the name of what was parsed.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(json_problem(error)) from None
    if may_be_too_deep(text, 0, len(text)) and is_too_deep(value):
        raise ValueError(TOO_DEEP)
    return value


def json_problem(error: ValueError | RecursionError) -> str:
    """Returns what is wrong with a text for which json's parser raised `error`."""
    if isinstance(error, RecursionError):
        return TOO_DEEP
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON: {error}"
    return "has a number of more than 4,300 digits"  # Python's limit; nothing else is raised


def may_be_too_deep(text: str, start: int, end: int) -> bool:
    """Returns whether a part of a JSON text has enough brackets to be nested too deep."""
    return text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH


def is_too_deep(value: Any) -> bool:
    """Returns whether lists and objects are nested in more than `MAX_DEPTH` levels."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for container in level
            if isinstance(container, list | dict)
            for item in (container.values() if isinstance(container, dict) else container)
        ]
    return bool(level)
