"""`Note`: how far an unfinished run of preprocess is, saved so that it can be resumed."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glm3cli.data.indexed import Mark
from glm3cli.data.preprocess.counts import Counts
from glm3cli.data.preprocess.readers.inputs import Place
from glm3cli.host.files import write_json


@dataclass
class Note:
    """Everything that is needed to resume a run; saved as JSON.

    Attributes:
        job: The fields of the run's `Job`.
        place: The position in the input.
        begin: The position in the input at which the run began; None before its first chunk.
        counts: The counts up to that position.
        marks: The positions of the writers, by output key.
        lost: For every input file that can't be read whole, the share of it that is lost, 0 to 1,
            or None if that can't be told.
        error_bytes: The size of the file of bad rows, in bytes.
        is_finished: Whether all files are complete and only have to be moved.
    """

    job: dict[str, Any]
    place: Place = field(default_factory=Place)
    begin: Place | None = None
    counts: Counts = field(default_factory=Counts)
    marks: dict[str, Mark] = field(default_factory=dict)
    lost: dict[str, float | None] = field(default_factory=dict)
    error_bytes: int = 0
    is_finished: bool = False

    @classmethod
    def read(cls, path: Path) -> "Note | None":
        """Reads a note; returns None if there is none or it is damaged."""
        try:
            values = json.loads(path.read_text("utf-8"))
            values["place"] = Place(**values["place"])
            values["begin"] = Place(**values["begin"]) if values.get("begin") else None
            values["counts"] = Counts(**values["counts"])
            values["marks"] = {name: Mark(**mark) for name, mark in values["marks"].items()}
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, path: Path) -> None:
        """Writes the note, whole or not at all."""
        write_json(path, asdict(self))
