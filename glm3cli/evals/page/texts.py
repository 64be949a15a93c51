"""Texts that UTF-8 can hold: JSON can spell half of a surrogate pair, which is no character."""

import json
from pathlib import Path
from typing import Any

from glm3cli.host.files import write_text


def whole(text: str) -> str:
    """Returns a text with U+FFFD for each half of a surrogate pair, as the tokenizer reads it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def write_whole(path: Path, text: str) -> None:
    """Writes a report as `host.files.write_text` does, whatever texts of others are in it.

    Raises:
        OSError: The disk is full or failing; `path` is unchanged.
    """
    write_text(path, whole(text))


def write_whole_json(path: Path, values: Any) -> None:
    """Writes a result as `host.files.write_json` does, whatever texts of others are in it.

    Raises:
        OSError: The disk is full or failing; `path` is unchanged.
        TypeError: Something in `values` has no form in JSON; `path` is unchanged.
    """
    write_whole(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")
