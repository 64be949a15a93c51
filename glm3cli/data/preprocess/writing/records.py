"""The files that describe what a run wrote: its statistics, its record, and its bad rows.

The record is hidden and written last: it holds the statistics of the run that wrote the token files
beside it, while PREFIX.stats.json is that of the last run of the prefix, texts or conversations.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm3cli.errors import DataError
from glm3cli.host.files import write_json

# The ends of the names of the record and of the list of bad rows.
RECORD, ERRORS = "record.json", "errors.jsonl"


def write_stats(prefix: Path, stats: dict[str, Any]) -> None:
    """Writes PREFIX.stats.json, unless it holds exactly these statistics already."""
    path = stats_path(prefix)
    with contextlib.suppress(OSError, ValueError):
        if json.loads(path.read_text("utf-8")) == stats:
            return
    write_json(path, stats)


def stats_path(prefix: Path) -> Path:
    """Returns the path of PREFIX.stats.json."""
    return prefix.with_name(f"{prefix.name}.stats.json")


def errors_path(prefix: Path) -> Path:
    """Returns the path of PREFIX.errors.jsonl, which lists the bad rows that were left out."""
    return prefix.with_name(f"{prefix.name}.{ERRORS}")


def records(folder: Path) -> list[dict[str, Any]]:
    """Returns the statistics of all runs whose files are in a folder, as their records have them.

    Raises:
        DataError: A record is damaged.
    """
    found = []
    for path in sorted(folder.glob(f".*.{RECORD}")):
        try:
            found.append(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged: {error}", "copy or make it again") from None
    return found


def record_path(prefix: Path, names: Mapping[str, str]) -> Path:
    """Returns the path of the hidden record: the statistics of the run that wrote the files."""
    return prefix.with_name(f".{next(iter(names.values()))}.{RECORD}")
